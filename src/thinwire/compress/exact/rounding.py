"""Rounding to a low-precision dtype so that nothing is lost in the mean: to one neighbour or the other, by a draw."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from thinwire import streams

_HALF, _ONE, _16 = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
_QUIET = np.uint16(0x7FC0)


@njit(nogil=True, cache=True, error_model="numpy")
def _to_bfloat16(x, draws, out):
    """x, float32 [n], to bits of bfloat16, by draws, uint16 [n]; each a neighbour by its share of the way."""
    bits, pair = x.view(np.uint32), np.empty(2, np.uint32)
    both = pair.view(np.float32)
    for i in range(x.size):
        if x[i] != x[i]:
            out[i] = _QUIET
            continue
        near = (bits[i] + _HALF + ((bits[i] >> _16) & _ONE)) >> _16
        pair[0] = near << _16
        gap = x[i] - both[0]
        other = near + _ONE if (gap > 0) == (x[i] > 0) else near - _ONE
        pair[1] = other << _16
        share = gap / (both[1] - both[0])
        chosen = (np.float32(draws[i]) + np.float32(0.5)) / np.float32(65536) < share
        out[i] = other if chosen else near


def stochastic(x: Tensor, dtype: torch.dtype, key: int, stream: int) -> Tensor:
    """x, float32, rounded to one of its two neighbours in bfloat16 or float16 so that the mean over keys is x.

    The draws are words of a stream under a 64-bit key (16 bits an element): the same on every machine. float32 stays as
    it is. What is beyond the dtype's range becomes infinite.
    """
    if dtype == torch.float32:
        return x.clone()
    draws = streams.words(key, [stream], (x.numel() + 3) // 4).view("<u2")[0, : x.numel()]
    if dtype == torch.bfloat16:
        out = np.empty(x.numel(), np.uint16)
        _to_bfloat16(x.detach().reshape(-1).contiguous().numpy(), draws, out)
        return torch.from_numpy(out).view(dtype).reshape(x.shape)
    near = x.to(dtype)
    gap = x - near.float()
    pattern = near.view(torch.int16)
    # Patterns of one sign are ordered by magnitude: the next value away from zero is the next pattern, inf at the end.
    other = torch.where((gap > 0) == (x > 0), pattern + 1, pattern - 1).view(dtype)
    share = gap / (other.float() - near.float())  # of the way to the other neighbour, at most a half; NaN beside inf
    drawn = torch.from_numpy(draws.copy()).reshape(x.shape).float()
    return torch.where((drawn + 0.5) / 65536 < share, other, near)


def moves(x: Tensor, change: Tensor) -> Tensor:
    """Where x + change, rounded to x's dtype, is another value than x: bool, of x's shape; change is float32."""
    return (x.float() + change).to(x.dtype) != x
