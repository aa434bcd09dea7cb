"""The directions in plain torch operations, on whatever device the tensors are: for a GPU where Triton is absent.

Bit-identical to `thinwire.perturb.philox` and `thinwire.perturb.sign_cpu`: every product and every sum is an operation
of its own, so that no compiler can fuse two of them. It is slow for what a GPU can do, as each operation goes through
memory; `thinwire.perturb.triton_kernels` has the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from thinwire.perturb import philox, sign_cpu
from thinwire.perturb.normal_table import quantiles
from thinwire.streams import MULTIPLIERS, ROUNDS, WEYL

TILE = 1 << 20
"""Elements at a time, so that temporaries stay below a hundred megabytes."""

_LOW, _HALF = 0xFFFFFFFF, 0xFFFF


def _product(word: Tensor | int, multiplier: int) -> tuple[Tensor | int, Tensor | int]:
    """The upper and the lower 32 bits of word * multiplier, both below 2^32.

    By halves of the multiplier, because the whole product can exceed int64.
    """
    small, large = word * (multiplier & _HALF), word * (multiplier >> 16)
    return (large + (small >> 16)) >> 16, (((large & _HALF) << 16) + small) & _LOW


def words(c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int, key: int) -> tuple[Tensor, ...]:
    """`philox.philox4x32` of int64 tensors and integers below 2^32, which broadcast; key: all 64 bits of it."""
    for turn in range(ROUNDS):
        r0 = (key + turn * WEYL[0]) & _LOW
        r1 = ((key >> 32) + turn * WEYL[1]) & _LOW
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ r0, low1, high0 ^ c3 ^ r1, low0
    return tuple(map(torch.as_tensor, (c0, c1, c2, c3)))


def _counter(start: int, count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, slice]:
    """Both counter words of the blocks of `size` elements that hold start .. start + count, and where these lie."""
    first, last = start // size, -(-(start + count) // size)
    # the sum is one of integers, whereas arange may count its steps in floating point
    blocks = torch.arange(last - first, device=device) + first
    return blocks & _LOW, blocks >> 32, slice(start - size * first, start - size * first + count)


def check(
    law: str, weight: Tensor, out: Tensor, seeds: ArrayLike, coefs: ArrayLike
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Seeds as uint64 [k] and coefs as float32 [k]; ValueError on tensors or lengths that `accumulate` cannot take."""
    if law not in ("gaussian", "sign"):
        raise ValueError(f"unknown law {law!r}; known: gaussian, sign")
    for name, tensor in (("weight", weight), ("out", out)):
        known = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not known or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32, bfloat16 or float16 of one dimension, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
        raise ValueError(
            f"out is {out.dtype} of {out.numel()} elements on {out.device}, "
            f"weight is {weight.dtype} of {weight.numel()} on {weight.device}"
        )
    return philox.check_pairs(seeds, coefs)


@cache
def quantiles_on(device: torch.device) -> Tensor:
    """The 65,536 quantiles on a device, float32."""
    return torch.tensor(quantiles(), device=device)


# a replay asks for the same tables once for every parameter of a model, and they take a few milliseconds to make
@lru_cache(maxsize=2)
def _tables_on(device: torch.device, seeds: bytes, coefs: bytes) -> tuple[list[int], Tensor]:
    """`sign_cpu.tables_of` on a device: the groups [g], and their sums, float32 [g, 4, 256]."""
    groups, tables = sign_cpu.tables_of(np.frombuffer(seeds, np.uint64), np.frombuffer(coefs, np.float32))
    return groups.tolist(), torch.from_numpy(tables).to(device)


def accumulate(
    law: str,
    weight: Tensor,
    out: Tensor,
    run_key: int,
    pid: int,
    seeds: ArrayLike,
    coefs: ArrayLike,
    scale: float = 1.0,
    start: int = 0,
) -> None:
    """out = scale * weight + sum_k coefs[k] * z_{seeds[k]}, to the bit what the specification of `law` gives.

    law: gaussian or sign. weight, out: contiguous [n] of one dtype, float32, bfloat16 or float16, on one device; out is
    weight itself or shares no memory with it. All is computed in float32 and rounded to weight's dtype once. seeds:
    integers [k] below 2^32; coefs: [k], rounded to float32, as is scale. ValueError on anything else.
    """
    philox.check_address(run_key, pid, start)
    seeds, coefs = check(law, weight, out, seeds, coefs)
    factor = float(np.float32(scale))
    sum_up = _gaussian_sum if law == "gaussian" else _sign_sum
    add_tile = sum_up(run_key, pid, seeds, coefs, weight.device)
    for first in range(0, weight.numel(), TILE):
        piece = weight[first : first + TILE]
        moved = piece.to(torch.float32) * factor
        if seeds.size:
            total = torch.zeros_like(moved)
            add_tile(total, start + first)
            moved.add_(total)
        out[first : first + TILE].copy_(moved)


def _gaussian_sum(
    run_key: int, pid: int, seeds: NDArray[np.uint64], coefs: NDArray[np.float32], device: torch.device
) -> Callable[[Tensor, int], None]:
    """What adds the Gaussian directions of all seeds, from an element on, to a tile of totals."""
    table, pairs = quantiles_on(device), list(zip(seeds.tolist(), coefs.tolist(), strict=True))

    def add(total: Tensor, start: int) -> None:
        low, high, here = _counter(start, total.numel(), philox.BLOCK, device)
        for seed, coef in pairs:
            drawn = torch.stack(words(low, high, pid, seed, run_key), dim=-1)
            numbers = torch.stack([drawn & _HALF, drawn >> 16], dim=-1).view(-1)[here]
            total.add_(table.index_select(0, numbers).mul_(coef))

    return add


def _sign_sum(
    run_key: int, pid: int, seeds: NDArray[np.uint64], coefs: NDArray[np.float32], device: torch.device
) -> Callable[[Tensor, int], None]:
    """What adds the sign directions of all seeds, from an element on, to a tile of totals."""
    groups, tables = _tables_on(device, seeds.tobytes(), coefs.tobytes())

    def add(total: Tensor, start: int) -> None:
        low, high, here = _counter(start, total.numel(), sign_cpu.BLOCK, device)
        for group, table in zip(groups, tables, strict=True):
            drawn = torch.stack(words(low, high, pid, group, run_key), dim=-1).view(-1)[here]
            for b in range(4):
                total.add_(table[b].index_select(0, (drawn >> 8 * b) & 255))

    return add


def matrix(
    run_key: int, pid: int, seeds: ArrayLike, start: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The sign directions as columns: float32 [count, k] on the device, entry [e, k] = element start + e of seeds[k].

    seeds: in any order, with any gaps. ValueError where an address is out of its range.
    """
    philox.check_address(run_key, pid, start)
    seeds, device = philox.check_seeds(seeds), torch.device(device)
    out = torch.empty((count, seeds.size), device=device)
    if out.numel() == 0:
        return out
    found, which = np.unique(seeds // sign_cpu.GROUP, return_inverse=True)
    groups = torch.from_numpy(found.astype(np.int64)).to(device)
    columns = torch.from_numpy(which.astype(np.int64)).to(device)
    bits = torch.from_numpy((seeds % sign_cpu.GROUP).astype(np.int64)).to(device)
    rows = max(sign_cpu.BLOCK, TILE // seeds.size)
    for first in range(0, count, rows):
        target = out[first : first + rows]
        low, high, here = _counter(start + first, len(target), sign_cpu.BLOCK, device)
        drawn = torch.stack(words(low[:, None], high[:, None], pid, groups, run_key), dim=1).flatten(0, 1)[here]
        target.copy_(drawn.index_select(1, columns).bitwise_right_shift_(bits).bitwise_and_(1))
        target.mul_(2).sub_(1)
    return out
