"""Rounding to a low-precision dtype so that nothing is lost in the mean: to one neighbour or the other, by a draw."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.perturb import cpu


def stochastic(x: Tensor, dtype: torch.dtype, key: int, stream: int) -> Tensor:
    """x, float32, rounded to one of its two neighbours in bfloat16 or float16 so that the mean over keys is x.

    The draws are words of a stream under a 64-bit key (16 bits an element): the same on every machine. float32 stays as
    it is. What is beyond the dtype's range becomes infinite.
    """
    if dtype == torch.float32:
        return x.clone()
    near = x.to(dtype)
    gap = x - near.float()
    pattern = near.view(torch.int16)
    # Patterns of one sign are ordered by magnitude: the next value away from zero is the next pattern, inf at the end.
    other = torch.where((gap > 0) == (x > 0), pattern + 1, pattern - 1).view(dtype)
    share = gap / (other.float() - near.float())  # of the way to the other neighbour, at most a half; NaN beside inf
    draws = torch.from_numpy(cpu.words(key, [stream], (x.numel() + 3) // 4).view("<u2")[0, : x.numel()].copy())
    return torch.where((draws.reshape(x.shape).float() + 0.5) / 65536 < share, other, near)


def moves(x: Tensor, change: Tensor) -> Tensor:
    """Where x + change, rounded to x's dtype, is another value than x: bool, of x's shape; change is float32."""
    return (x.float() + change).to(x.dtype) != x
