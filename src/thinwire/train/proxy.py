"""How the tensors of a smaller model around a block travel: the block's exactly, matrices around it in few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks as Coarse
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.compress.exact import coarse
from thinwire.train.versions import coded, decoded
from thinwire.wire import Illegal
from thinwire.wire.payload import Spec


@dataclass(frozen=True)
class Coder:
    """`around` is "exact" or the bits of matrices around the block, "7bit"; with `coded` all is entropy-coded."""

    around: str
    coded: bool

    def coarse(self, shape: Sequence[int], own: bool) -> Coarse | None:
        """The code of a tensor in few bits, if it is so coded; `own`: it is the block's."""
        return None if self.around == "exact" or own or len(shape) < 2 else Coarse(int(self.around[0]))

    def encode(self, part: Tensor, base: Tensor | None, own: bool) -> tuple[Tensor, Tensor]:
        """How a tensor of the proxy travels, and what it is there; `base` is what both ends hold of it."""
        code = self.coarse(part.shape, own)
        if code is None:
            return coded(part, base) if self.coded else part, part
        scales, codes = code.rounded(part.float(), 0)
        data = coarse.encode(scales, codes, code, base) if self.coded else code.join(scales, codes)
        return to_tensor(data), code.values(scales, codes, part.shape).to(part.dtype)

    def decode(self, change: Tensor, name: str, base: Tensor | None, like: Spec, own: bool) -> Tensor:
        """The inverse; Illegal, with the tensor's name, where it is not what it should be."""
        code = self.coarse(like.shape, own)
        if code is None:
            return self.exact(change, name, base, like)
        try:
            data, count = to_bytes(change), math.prod(like.shape)
            found = coarse.decode(data, code, base, count) if self.coded else code.split(data, count)
            return code.values(*found, like.shape).to(like.dtype)
        except ValueError as error:
            raise Illegal(f"{name}: {error}") from None

    def exact(self, change: Tensor, name: str, old: Tensor | None, like: Spec) -> Tensor:
        """A tensor that travels exactly; Illegal where it is not what it should be."""
        if self.coded:
            return decoded(change, name, old, like)
        if Spec.of(change) != like:
            raise Illegal(f"{name} is {change.dtype} {list(change.shape)}, not {like.dtype} {list(like.shape)}")
        return change
