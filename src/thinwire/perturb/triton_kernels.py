"""The GPU kernels of the directions, in Triton: bit-identical to `philox` and `signs` of this package.

A program keeps the totals of a tile in registers while it loops over all seeds (Gaussian) or groups of 32 seeds
(signs), and reads and writes the weights once. One Philox block serves as many neighbouring elements as the law draws
from it. Tiles begin at multiples of their size from element 0 of the parameter, so that none straddles the carry into
the counter's second word: that word is one number for a whole program.

No multiplication may be fused with a sum, for the specification rounds both: LAUNCH forbids it to the compiler.
Importing this module needs Triton; `thinwire.perturb.torch_kernels` does without.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from thinwire.perturb import philox, sign_cpu, torch_kernels
from thinwire.streams import MULTIPLIERS, ROUNDS, WEYL

LAUNCH = {"enable_fp_fusion": False, "num_warps": 4}
"""How every kernel is compiled."""
GAUSSIAN_BLOCKS, SIGN_BLOCKS, MATRIX_BLOCKS = 256, 256, 32
"""Philox blocks in a program's tile, powers of two."""

_M0, _M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_W0, _W1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])
_ROUNDS = tl.constexpr(ROUNDS)

_ANY = ("tile", "pid", "key0", "key1", "many", "groups")
"""Arguments for whose values no kernel is compiled apart: most change from one parameter to the next. `lead` and `size`
are not among them, since where both are multiples of 16 the weights are read and written as vectors."""


@triton.jit
def _draw(position, pid, last, key0, key1, blocks: tl.constexpr):
    """The words of the blocks of tile number `position`: four of each block, as uint32 [blocks]."""
    first = position * blocks
    c0 = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, blocks).to(tl.uint32)
    c1, c2, c3 = (first >> 32).to(tl.uint32), pid.to(tl.uint32), last.to(tl.uint32)
    k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
    for turn in tl.static_range(_ROUNDS):
        r0, r1 = k0 + ((turn * _W0) & 0xFFFFFFFF), k1 + ((turn * _W1) & 0xFFFFFFFF)
        # one product of 64 bits is one instruction, its two halves apart would be two
        p0, p1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ r0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ r1, p0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _in_turn(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], ... of four tensors of one dimension."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape([4 * a.shape[0]])


@triton.jit
def _write(weight, out, total, at, size, scale):
    """out = scale * weight + total where `at`, the place of each total, is in 0 .. size."""
    inside = (at >= 0) & (at < size)
    moved = scale * tl.load(weight + at, mask=inside).to(tl.float32) + total
    tl.store(out + at, moved.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ANY)
def _gaussian(weight, out, lead, size, tile, pid, key0, key1, seeds, coefs, many, scale, table, blocks: tl.constexpr):
    """Element i of weight, [size], has place lead + i in the tiles from number `tile` on. seeds, coefs: [many]."""
    program = tl.program_id(0).to(tl.int64)
    total0 = tl.zeros([blocks], tl.float32)
    total1, total2, total3, total4, total5, total6, total7 = (
        total0,
        total0,
        total0,
        total0,
        total0,
        total0,
        total0,
    )
    for k in range(many):
        coef = tl.load(coefs + k)
        w0, w1, w2, w3 = _draw(program + tile, pid, tl.load(seeds + k), key0, key1, blocks)
        total0 += coef * tl.load(table + (w0 & 0xFFFF))
        total1 += coef * tl.load(table + (w0 >> 16))
        total2 += coef * tl.load(table + (w1 & 0xFFFF))
        total3 += coef * tl.load(table + (w1 >> 16))
        total4 += coef * tl.load(table + (w2 & 0xFFFF))
        total5 += coef * tl.load(table + (w2 >> 16))
        total6 += coef * tl.load(table + (w3 & 0xFFFF))
        total7 += coef * tl.load(table + (w3 >> 16))
    even, odd = _in_turn(total0, total2, total4, total6), _in_turn(total1, total3, total5, total7)
    at = program * (8 * blocks) + tl.arange(0, 8 * blocks) - lead
    _write(weight, out, tl.join(even, odd).reshape([8 * blocks]), at, size, scale)


@triton.jit
def _look(total, table, word):
    """total and the four sums that a word stands for, in the order of its bytes."""
    total += tl.load(table + (word & 255))
    total += tl.load(table + ((word >> 8) & 255) + 256)
    total += tl.load(table + ((word >> 16) & 255) + 512)
    total += tl.load(table + (word >> 24) + 768)
    return total


@triton.jit(do_not_specialize=_ANY)
def _sign(weight, out, lead, size, tile, pid, key0, key1, numbers, tables, many, scale, blocks: tl.constexpr):
    """As `_gaussian`; numbers: [many], of the groups; tables: float32 [many, 1024], their sums."""
    program = tl.program_id(0).to(tl.int64)
    total0 = tl.zeros([blocks], tl.float32)
    total1, total2, total3 = total0, total0, total0
    for g in range(many):
        w0, w1, w2, w3 = _draw(program + tile, pid, tl.load(numbers + g), key0, key1, blocks)
        total0, total1 = _look(total0, tables, w0), _look(total1, tables, w1)
        total2, total3 = _look(total2, tables, w2), _look(total3, tables, w3)
        tables += 1024
    at = program * (4 * blocks) + tl.arange(0, 4 * blocks) - lead
    _write(weight, out, _in_turn(total0, total1, total2, total3), at, size, scale)


@triton.jit(do_not_specialize=_ANY)
def _matrix(out, lead, size, tile, pid, key0, key1, numbers, bounds, columns, bits, groups, many, blocks: tl.constexpr):
    """The elements of a tile as rows of out, [size, many], for one group of seeds.

    Group g has number numbers[g], and of the columns and their bits those from bounds[g] up to bounds[g + 1].
    """
    program = tl.program_id(0)
    g, position = program % groups, (program // groups).to(tl.int64)
    w0, w1, w2, w3 = _draw(position + tile, pid, tl.load(numbers + g), key0, key1, blocks)
    words = _in_turn(w0, w1, w2, w3)
    row = position * (4 * blocks) + tl.arange(0, 4 * blocks) - lead
    inside = (row >= 0) & (row < size)
    end = tl.load(bounds + g + 1)
    for first in range(tl.load(bounds + g), end, 32):
        k = first + tl.arange(0, 32)
        column = tl.load(columns + k, mask=k < end, other=0)
        bit = tl.load(bits + k, mask=k < end, other=0).to(tl.uint32)
        sign = tl.where(((words[:, None] >> bit[None, :]) & 1) == 1, 1.0, -1.0)
        tl.store(out + row[:, None] * many + column[None, :], sign, mask=inside[:, None] & (k < end)[None, :])


def _signed(word: int) -> int:
    """The int32 of the bits of a word below 2^32: the type of an argument then does not depend on its value."""
    return word - (word >> 31 << 32)


def _upload(words: NDArray[np.integer], device: torch.device) -> Tensor:
    """Words below 2^32 as int32 of the same bits."""
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)).to(device)


# a replay asks for the same terms once for every parameter of a model; tables take a few milliseconds to make
@lru_cache(maxsize=2)
def _terms(law: str, device: torch.device, seeds: bytes, coefs: bytes) -> tuple[Tensor, Tensor]:
    """What the kernel of the law adds, on the device: seeds and coefs, or the numbers of groups and their tables."""
    numbers, values = np.frombuffer(seeds, np.uint64), np.frombuffer(coefs, np.float32)
    if law == "sign":
        numbers, values = sign_cpu.tables_of(numbers, values)
    return _upload(numbers, device), torch.tensor(values, device=device)


@lru_cache(maxsize=8)
def _columns(device: torch.device, seeds: bytes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seeds by group, for the kernel of `matrix`: numbers [g], bounds [g + 1], columns [k] and bits [k]."""
    given = np.frombuffer(seeds, np.uint64)
    columns = np.argsort(given, kind="stable")
    numbers, bounds = np.unique(given[columns] // sign_cpu.GROUP, return_index=True)
    arrays = numbers, np.append(bounds, given.size), columns, given[columns] % sign_cpu.GROUP
    first, second, third, fourth = (_upload(array, device) for array in arrays)
    return first, second, third, fourth


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
    """`thinwire.perturb.torch_kernels.accumulate`, by one kernel."""
    philox.check_address(run_key, pid, start)
    seeds, coefs = torch_kernels.check(law, weight, out, seeds, coefs)
    if seeds.size == 0 or weight.numel() == 0:
        # a kernel would add +0.0, which changes -0.0
        torch_kernels.accumulate(law, weight, out, run_key, pid, seeds, coefs, scale, start)
        return
    numbers, values = _terms(law, weight.device, seeds.tobytes(), coefs.tobytes())
    blocks, elements = (GAUSSIAN_BLOCKS, philox.BLOCK) if law == "gaussian" else (SIGN_BLOCKS, sign_cpu.BLOCK)
    tile, lead = divmod(int(start), blocks * elements)
    grid = (triton.cdiv(lead + weight.numel(), blocks * elements),)
    address = tile, _signed(pid), _signed(run_key & 0xFFFFFFFF), _signed(run_key >> 32)
    rest = numbers, values, len(numbers), float(np.float32(scale))
    with torch.cuda.device(weight.get_device()):
        if law == "gaussian":
            table = torch_kernels.quantiles_on(weight.device)
            _gaussian[grid](weight, out, lead, weight.numel(), *address, *rest, table, blocks=blocks, **LAUNCH)
        else:
            _sign[grid](weight, out, lead, weight.numel(), *address, *rest, blocks=blocks, **LAUNCH)


def matrix(
    run_key: int, pid: int, seeds: ArrayLike, start: int, count: int, device: torch.device | str = "cuda"
) -> Tensor:
    """`thinwire.perturb.torch_kernels.matrix`, by one kernel."""
    philox.check_address(run_key, pid, start)
    seeds = philox.check_seeds(seeds)
    out = torch.empty((count, seeds.size), device=device)
    if out.numel() == 0:
        return out
    numbers, bounds, columns, bits = _columns(out.device, seeds.tobytes())
    tile, lead = divmod(int(start), MATRIX_BLOCKS * sign_cpu.BLOCK)
    grid = (triton.cdiv(lead + count, MATRIX_BLOCKS * sign_cpu.BLOCK) * len(numbers),)
    address = tile, _signed(pid), _signed(run_key & 0xFFFFFFFF), _signed(run_key >> 32)
    terms = numbers, bounds, columns, bits, len(numbers), seeds.size
    with torch.cuda.device(out.get_device()):
        _matrix[grid](out, lead, count, *address, *terms, blocks=MATRIX_BLOCKS, **LAUNCH)
    return out
