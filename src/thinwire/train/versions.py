"""Weights that all peers hold to the bit, and the exact differences between them that travel."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from thinwire import streams
from thinwire.compress.catalogue import TensorCode
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.compress.exact import ulp
from thinwire.compress.exact.rounding import stochastic
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder
from thinwire.wire import Illegal
from thinwire.wire.payload import Spec


class Exact(FirstOrder):
    """What methods have in common whose peers hold the same low-precision weights and send exact differences."""

    rounding: Literal["stochastic", "residue", "nearest"] = "stochastic"  # of what is sent without loss
    dtype: Literal["model", "bfloat16", "float16"] = (
        "model"  # of the weights that peers hold; the model trains in its own
    )
    start: Literal["sent", "shared"] = "sent"  # shared: every site has the start model, newcomers receive a difference

    def held_dtype(self, own: torch.dtype) -> torch.dtype:
        """The dtype of what peers hold of a parameter."""
        return own if self.dtype == "model" else getattr(torch, self.dtype)

    def start_of(self, net: Net, name: str) -> Tensor:
        """A tensor of the start model as peers hold it."""
        weights = net.base[name]
        return weights.to(self.held_dtype(weights.dtype))

    def rounded(self, target: Tensor, dtype: torch.dtype, key: int, stream: int) -> Tensor:
        """A float32 target in the dtype that is held."""
        return stochastic(target, dtype, key, stream) if self.rounding == "stochastic" else target.to(dtype)


def layout(specs: Mapping[str, Spec]) -> str:
    """Whose weights they are, for people and to be compared: names, shapes and dtypes."""
    digest = hashlib.sha256(repr([(name, *spec.packed()) for name, spec in specs.items()]).encode()).hexdigest()
    dtypes = " and ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()}))
    count = sum(math.prod(spec.shape) for spec in specs.values())
    return f"{count:,} {dtypes} weights in {len(specs)} tensors ({digest[:8]})"


def coded(new: Tensor, old: Tensor | None) -> Tensor:
    """The exact difference of two tensors, or without `old` the new one: uint8."""
    return to_tensor(ulp.encode(new, old))


def decoded(change: Tensor, name: str, old: Tensor | None, like: Spec) -> Tensor:
    """The inverse; Illegal, with the tensor's name, for what is none."""
    try:
        return ulp.decode(to_bytes(change), old, like.dtype, like.shape)
    except ValueError as error:
        raise Illegal(f"{name}: {error}") from None


def lossy_decoded(code: TensorCode, change: Tensor, name: str, like: Spec, key: int, stream: int) -> Tensor:
    """What a lossy code decodes to, float32; Illegal, with the tensor's name, for bytes that are none."""
    try:
        return code.decode(to_bytes(change), like.shape, key_below(key, stream))
    except ValueError as error:
        raise Illegal(f"{name}: {error}") from None


def key_below(key: int, stream: int) -> int:
    """A key for each tensor below the one that travels."""
    return int(streams.words(key, [stream], 1)[0, 0])
