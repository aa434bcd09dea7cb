"""The autoencoder that CG-FedLLM publishes as ResNet-3 (Wu et al., 2024, arXiv:2405.13746): 1/64 of the numbers.

    encoder   Conv3x3(1 -> 1), then six halvings 1 -> 2 -> 4 ... -> 64 channels, each Conv3x3 stride 2, BatchNorm, ReLU,
              then three residual blocks of 64 channels: image [1, H, W] -> latent [64, H/64, W/64]
    decoder   three residual blocks, six doublings back, Conv7x7(1 -> 1) with bias, Tanh

246,785 and 246,698 parameters, as the paper counts them. Its faults are kept, since it stands here for comparison: the
first layer is one channel behind a ReLU, which throws half of the signs away; the last is a Tanh, while updates are of
the size 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from thinwire.compress.entropy.packing import check_key, flatten
from thinwire.compress.learned.lora_image import Image

CHANNELS = (1, 2, 4, 8, 16, 32, 64)


class Residual(nn.Module):
    """x + two convolutions of x, each behind a reflected border."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] -> the same; h and w are 2 at least, as a border is reflected."""
        out: Tensor = x + self.path(x)
        return out


def encoder() -> nn.Sequential:
    """Images [batch, 1, H, W] -> latents [batch, 64, H/64, W/64]; H and W are multiples of 64, 128 at least."""
    parts: list[nn.Module] = [nn.ReflectionPad2d(1), nn.Conv2d(1, 1, 3, bias=False), nn.BatchNorm2d(1), nn.ReLU()]
    for before, after in pairwise(CHANNELS):
        parts += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, *(Residual(CHANNELS[-1]) for _ in range(3)))


def decoder() -> nn.Sequential:
    """Latents [batch, 64, h, w] -> images [batch, 1, 64 h, 64 w], each number within -1 and 1."""
    parts: list[nn.Module] = [Residual(CHANNELS[-1]) for _ in range(3)]
    for before, after in pairwise(CHANNELS[::-1]):
        up = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1, bias=False)
        parts += [up, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.ReflectionPad2d(3), nn.Conv2d(1, 1, 7), nn.Tanh())


class AutoEncoder(nn.Module):
    """Both halves; the client has the first and the server the second."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()

    @classmethod
    def drawn(cls, seed: int) -> AutoEncoder:
        """Weights drawn from a seed as torch draws them; the global generators stay as they are."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**63)
            return cls()

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, 1, H, W] -> what is left of them."""
        found: Tensor = self.decoder(self.encoder(images))
        return found


def latent_shape(height: int, width: int) -> tuple[int, int, int]:
    """The latent's shape for an image [height, width]; ValueError where its sides are not served."""
    for side in (height, width):
        if side % 64 or side < 128:
            raise ValueError(f"an image of {height} x {width}: each side must be a multiple of 64, 128 at least")
    return (CHANNELS[-1], height // 64, width // 64)


def fit(
    model: AutoEncoder, images: Sequence[Tensor], iterations: int, batch: int = 4, lr: float = 2e-4, seed: int = 0
) -> list[float]:
    """Train on images [H, W], already scaled, by Adam on the mean squared error (TGAP); returns the loss curve."""
    draw = torch.Generator().manual_seed(seed % 2**63)
    rule = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    model.train()
    for _ in range(iterations):
        picked = torch.randint(len(images), (min(batch, len(images)),), generator=draw)
        x = torch.stack([images[int(i)] for i in picked])[:, None]
        loss = (model(x) - x).square().mean()
        rule.zero_grad(set_to_none=True)
        loss.backward()
        rule.step()
        losses.append(loss.item())
    model.eval()
    return losses


@dataclass(frozen=True)
class Latents:
    """The autoencoder as a codec of images like `image`: the latent travels as float32, 1/64 of the bytes.

    `tables`: the weights of both halves under encoder. and decoder., as trained; `scale`, float32 [1]: what
    an image is multiplied by first; `range`, float32 [2]: the smallest and the largest number in a latent of TGAP.
    """

    image: Image
    tables: Mapping[str, Tensor]

    @cached_property
    def _model(self) -> AutoEncoder:
        model = AutoEncoder.drawn(0)
        model.load_state_dict({n: t for n, t in self.tables.items() if n.startswith(("encoder.", "decoder."))})
        return model.eval()

    @torch.no_grad()
    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 [height, width] as the bytes of its latent; the key does not matter. ValueError unless finite."""
        check_key(key)
        flatten(x)
        latent = self._model.encoder((x * self.tables["scale"])[None, None])
        return bytes(latent.numpy().astype("<f4").tobytes())

    @torch.no_grad()
    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The image back; ValueError for a latent of another size, not finite, or beyond twice the trained range."""
        check_key(key)
        if tuple(shape) != (self.image.height, self.image.width):
            raise ValueError(f"an image of {list(shape)}, not [{self.image.height}, {self.image.width}]")
        sides = latent_shape(self.image.height, self.image.width)
        if len(data) != self.image.count // 16:
            raise ValueError(f"a latent of {len(data)} bytes, not {self.image.count // 16}")
        latent = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).reshape(1, *sides)
        low, high = self.tables["range"].tolist()
        if not bool(((latent >= 2 * min(low, 0)) & (latent <= 2 * max(high, 0))).all()):
            raise ValueError(f"a latent beyond what was trained on, {low:.3g} to {high:.3g}, or not finite")
        found: Tensor = self._model.decoder(latent)[0, 0]
        return found / self.tables["scale"]


@torch.no_grad()
def tables_of(model: AutoEncoder, images: Sequence[Tensor], scale: Tensor) -> dict[str, Tensor]:
    """What `Latents` needs of a trained model: its weights, the scale, and the range of the latents of these images."""
    model.eval()
    low, high = 0.0, 0.0
    for x in images:
        latent = model.encoder((x * scale)[None, None])
        low, high = min(low, float(latent.min())), max(high, float(latent.max()))
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return weights | {"scale": scale, "range": torch.tensor([low, high])}
