"""The codecs by name, behind one interface: with their own settings, or of a whole update at a share of float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.eden import Eden
from thinwire.compress.codecs.factors import Factors
from thinwire.compress.codecs.nnadq import Nnadq
from thinwire.compress.codecs.powersgd import PowerSgd
from thinwire.compress.codecs.qsgd import Qsgd
from thinwire.compress.codecs.sketch import Sketch
from thinwire.compress.codecs.ternary import WHOLE, Ternary
from thinwire.compress.codecs.topk import TopK
from thinwire.compress.entropy.packing import check_key, elements, flatten
from thinwire.compress.learned.autoencoder import Latents
from thinwire.compress.learned.components import Components
from thinwire.compress.learned.lora_image import SIDE, Image
from thinwire.streams import words

Name = Literal["none", "eden", "powersgd", "topk", "qsgd", "sign", "svd", "components", "resnet", "learned"]
TensorName = Literal["none", "sign", "ternary", "blocks", "eden", "topk", "factors", "sketch", "nnadq"]
LEARNT = ("resnet", "learned")  # which need an artefact of `thinwire fit-codec`
BUCKETS = {16: (7, 128), 32: (1, 72), 64: (1, 224)}
"""QSGD's levels and bucket by ratio, where updates take at most those bytes."""
VALUES = 4
"""Bits of a value that top-k sends: finer ones leave room for fewer."""
HEADER = 128
"""Bytes of a frame besides its code, at most: `components` and `learned`, whose size is free, leave room for them."""
ERRORS = {0.5: 2.14, 1: 0.571, 2: 0.133, 3: 0.0357, 4: 0.0096}
"""EDEN's |decoded - x|^2 / |x|^2 by bits."""
BLOCK = {"sign": 1024, "ternary": WHOLE, "blocks": 128, "topk": 4096}
"""Elements that share a scale (of top-k and ternary: among which the largest are sent) where none are given."""
WITHIN = (1 << 64) - 1
"""The stream that the key of a part's code is drawn from, so that its draws are not those that picked."""


class Code(Protocol):
    """Turns a tensor into bytes and back under a key, fresh for each client and round."""

    def encode(self, x: Tensor, key: int) -> bytes:
        """ValueError unless x is finite float32 on the CPU."""
        ...

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """Float32 of that shape; ValueError for bytes that `encode` would not have made."""
        ...


@dataclass(frozen=True)
class Plain:
    """Float32 as it is: no codec at all."""

    def encode(self, x: Tensor, key: int) -> bytes:
        """4 bytes an element, little-endian."""
        return flatten(x).astype("<f4").tobytes()

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The inverse, bit for bit."""
        if len(data) != 4 * elements(shape):
            raise ValueError(f"{len(data)} bytes for {elements(shape)} elements of float32")
        found = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).reshape(tuple(shape))
        flatten(found)  # finite
        return found


@dataclass(frozen=True)
class Shrunk:
    """EDEN at the length of least error in place of no bias: what error feedback needs, or it diverges."""

    eden: Eden

    def encode(self, x: Tensor, key: int) -> bytes:
        """See Eden."""
        return self.eden.encode(x, key)

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """See Eden."""
        return self.eden.decode(data, shape, key) / (1 + ERRORS[self.eden.bits])


@dataclass(frozen=True)
class Part:
    """`code` of a part of the coordinates, which the key picks: max(1, round(share n)) of n, share in (0, 1].

    Whoever has the key picks the same, so what goes up and what comes down under it are about the same coordinates. The
    others decode to 0: error feedback brings them in a later round, whose key is another.

    Picked are the elements whose words of stream 0 under the key are the least. Bytes: those of the code for one
    vector, the elements picked in their order; its own key is the first word of the stream WITHIN.
    """

    code: TensorCode
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} is not in (0, 1]")

    def kept(self, count: int) -> int:
        """How many of `count` elements are in the part."""
        return min(count, max(1, round(self.share * count)))

    def picked(self, count: int, key: int) -> NDArray[np.int64]:
        """The places of the part among `count` elements, ascending: int64 [kept]."""
        check_key(key)
        if self.share == 1:
            return np.arange(count)
        order = np.argsort(words(key, [0], max(1, count))[0][:count], kind="stable")
        return np.sort(order[: self.kept(count)])

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as bytes; ValueError unless x is finite float32 on the CPU."""
        flat = flatten(x)
        picked = flat[self.picked(flat.size, key)]
        return self.code.encode(torch.from_numpy(picked), _within(key))

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """Float32 of that shape, 0 beside the part; ValueError for bytes that `encode` would not have made."""
        check_key(key)
        count = elements(shape)
        # first: it refuses what is too short or too long before anything of the tensor's size is there
        values = self.code.decode(data, (self.kept(count),), _within(key))
        out = torch.zeros(count)
        out[torch.from_numpy(self.picked(count, key))] = values
        return out.reshape(tuple(shape))


TensorCode = Plain | Blocks | Ternary | Eden | Shrunk | TopK | Factors | Sketch | Nnadq | Part


def tensor_code(
    name: TensorName,
    bits: float = 4,
    rank: int = 16,
    share: float = 0.03,
    *,
    density: float = 0.05,
    ratio: float = 1.0,
    block: int | None = None,
    part: float = 1.0,
    contract: bool = False,
    coarseness: float = 1e-4,
) -> TensorCode:
    """The codec of tensors of any shape by its name, with what is its own of these settings.

    bits: a value (blocks, eden, factors, topk). rank: of factors. share: of the elements that top-k keeps. density: of
    those that ternary sends. ratio: of a sketch's numbers to the elements. block: elements that share a scale (sign,
    ternary, blocks, topk), such as a row's. part: of the coordinates, that the key picks. contract: EDEN shrunk, for
    error feedback; the others but nnadq contract anyway. coarseness: of nnadq, error for fewer bits. ValueError for a
    setting that this codec does not have.
    """
    if part != 1 and name == "factors":
        raise ValueError(f"part {part}: factors are of whole matrices")
    size = BLOCK.get(name, 0) if block is None else block
    table: dict[TensorName, Callable[[], TensorCode]] = {
        "none": Plain,
        "sign": lambda: Blocks(1, size),
        "ternary": lambda: Ternary(density, size),
        "blocks": lambda: Blocks(_whole(bits), size),
        "eden": lambda: Shrunk(Eden(bits)) if contract else Eden(bits),
        "topk": lambda: TopK(share, size, _whole(bits)),
        "factors": lambda: Factors(rank, _whole(bits)),
        "sketch": lambda: Sketch(ratio),
        "nnadq": lambda: Nnadq(coarseness),
    }
    code = table[name]()
    return code if part == 1 else Part(code, part)


def _whole(bits: float) -> int:
    if int(bits) != bits:
        raise ValueError(f"bits {bits} is not a whole number")
    return int(bits)


def sizes(code: TensorCode, shape: Sequence[int]) -> tuple[float, int]:
    """The fewest and the most bytes of a tensor of this shape: the same but where they depend on the numbers."""
    count = elements(shape)
    match code:
        case Part():
            return sizes(code.code, (code.kept(count),))
        case Ternary() | Nnadq():
            return code.sizes(count)
        case TopK():
            return 0.8 * code.most(count), code.most(count)  # about, where places are not clustered
        case Plain():
            size = 4 * count
        case Factors():
            size = code.size(shape)
        case Shrunk():
            size = code.eden.size(count)
        case _:
            size = code.size(count)
    return size, size


def side_of(name: Name) -> int:
    """What both sides of an image must be a multiple of for this codec."""
    return SIDE if name == "resnet" else 1


def code_of(
    name: Name, ratio: int, image: Image, tables: Mapping[str, Tensor] | None = None, contract: bool = False
) -> Code:
    """The codec of that name for images like `image`, in about 4 / `ratio` bytes a number; ratio is 16, 32 or 64.

    `tables`: of a learnt codec, or of `codebooks.untrained`. `contract`: for error feedback. ValueError where there is
    no such codec at that ratio.
    """
    bits = 32 / ratio
    size = 4 * image.count // ratio
    shape = (image.height, image.width)
    if name in (*LEARNT, "components") and not tables:
        raise ValueError(f"the codec {name} needs tables; for a learnt one thinwire fit-codec makes them")
    if name == "none":
        return Plain()
    if name == "eden":
        return Shrunk(Eden(bits)) if contract else Eden(bits)
    if name in ("powersgd", "svd"):
        return PowerSgd.within(size, shape, steps=1 if name == "powersgd" else 0)
    if name == "topk":
        return _topk(bits)
    if name == "qsgd":
        return Qsgd(*BUCKETS[ratio])
    if name == "sign":
        if bits > 1:
            raise ValueError(f"signs take one bit a number at most, which is a ratio of 32, not {ratio}")
        return Part(Blocks(1, BLOCK["sign"]), bits)
    assert tables is not None
    if name == "resnet":
        if ratio != 64:
            raise ValueError(f"the codec resnet has the ratio 64 and no other, not {ratio}")
        return Latents(image, tables)
    return Components(image, size - min(HEADER, size // 64), dict(tables), contract)


def _topk(bits: float) -> TopK:
    """Top-k of the largest share that takes at most `bits` a number."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if TopK(middle, bits=VALUES).rate <= bits else (low, middle)
    return TopK(low, bits=VALUES)


def _within(key: int) -> int:
    return int(words(key, [WITHIN], 1)[0, 0])
