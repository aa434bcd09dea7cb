"""The codecs by name, behind one interface: with their own settings, or of a whole update at a share of float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.eden import Eden
from thinwire.compress.codecs.factors import Factors
from thinwire.compress.codecs.powersgd import PowerSgd
from thinwire.compress.codecs.qsgd import Qsgd, Signs
from thinwire.compress.codecs.topk import TopK
from thinwire.compress.entropy.packing import elements, flatten
from thinwire.compress.learned.autoencoder import Latents
from thinwire.compress.learned.components import Components
from thinwire.compress.learned.lora_image import SIDE, Image

Name = Literal["none", "eden", "powersgd", "topk", "qsgd", "sign", "svd", "components", "resnet", "learned"]
TensorName = Literal["blocks", "eden", "factors", "topk"]
TensorCode = Blocks | Eden | Factors | TopK
LEARNT = ("resnet", "learned")  # which need an artefact of `thinwire fit-codec`
BUCKETS = {16: (7, 128), 32: (1, 72), 64: (1, 224)}
"""QSGD's levels and bucket by ratio, where updates take at most those bytes."""
VALUES = 4
"""Bits of a value that top-k sends: finer ones leave room for fewer."""
HEADER = 128
"""Bytes of a frame besides its code, at most: `components` and `learned`, whose size is free, leave room for them."""
ERRORS = {0.5: 2.14, 1: 0.571, 2: 0.133}
"""EDEN's |decoded - x|^2 / |x|^2 by bits."""


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


def tensor_code(name: TensorName, bits: float = 4, rank: int = 16, share: float = 0.03) -> TensorCode:
    """The codec of tensors of any shape: bits a value, the rank of factors, the share of elements that top-k keeps.

    ValueError for a setting that this codec does not have.
    """
    if name == "eden":
        return Eden(bits)
    if (whole := int(bits)) != bits:
        raise ValueError(f"bits {bits} is not a whole number")
    if name == "factors":
        return Factors(rank, whole)
    return Blocks(whole) if name == "blocks" else TopK(share, bits=whole)


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
        return Signs(bits)
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
