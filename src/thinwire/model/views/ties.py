"""Placeholder map until the kernel is merged: the plain numpy version."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from thinwire.streams import words


@lru_cache(1024)
def _map(key: int, numbers: int, stream: int, count: int) -> tuple[Tensor, Tensor]:
    w = words(key, [stream], -(-count // 2) or 1)[0].view(np.uint32)[:count].astype(np.uint64)
    index = ((w >> np.uint64(1)) * np.uint64(numbers)) >> np.uint64(31)
    return torch.from_numpy(index.astype(np.int64)), torch.from_numpy(1 - 2 * (w & np.uint64(1)).astype(np.float32))


@dataclass(frozen=True)
class Ties:
    key: int
    numbers: int

    def spread(self, theta: Tensor, stream: int, start: Tensor, out: Tensor, scale: float = 1.0) -> None:
        index, sign = _map(self.key, self.numbers, stream, out.numel())
        moved = start.flatten().float() + scale * sign * theta[index]
        out.copy_(moved.view(out.shape))

    def collect(self, gradient: Tensor, stream: int, into: Tensor, scale: float = 1.0) -> None:
        index, sign = _map(self.key, self.numbers, stream, gradient.numel())
        into.index_add_(0, index, gradient.flatten().float() * sign, alpha=scale)

    def signed(self, stream: int, count: int):
        index, sign = _map(self.key, self.numbers, stream, count)
        return index.numpy(), sign.numpy()
