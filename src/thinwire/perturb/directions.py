"""The directions of a run, as methods use them: torch tensors in, torch tensors out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.model.views.ties import Ties
from thinwire.perturb import gaussian_cpu, matmul_replay, philox, sign_cpu, table_replay, tied, torch_kernels

TILE = 1 << 20
"""Elements of the float32 copy through which weights pass that the kernel cannot take as they are."""

Law = Literal["gaussian", "sign", "lowrank"]
"""gaussian: independent normal elements. sign: independent signs. lowrank: for a matrix of m x n (of a tensor with more
dimensions, the last one against all others) A B^T / sqrt(r), A [m, r] and B [n, r] of signs; signs for a vector."""
PoolLaw = Literal["gaussian", "sign", "lowrank", "tied"]
"""Also tied, for a pool of a size that is known: each entry belongs to one direction alone, see the module."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Directions:
    """The finite pool of directions of a run: z_s for every seed s in [0, 2^32), one array for each parameter name.

    By the law tied the seeds are those below `size`, at most 2^24.

    `key` is the 64-bit run key. Element e of a direction belongs to the e-th element of the parameter in row-major
    order, whatever the strides of the tensor that holds it. gaussian and sign give the same bits on a CPU and on a GPU.
    """

    key: int
    law: PoolLaw = "gaussian"
    rank: int = 1
    size: int = 0

    def __post_init__(self) -> None:
        if self.law not in get_args(PoolLaw):
            raise ValueError(f"unknown law {self.law!r}; known: {', '.join(get_args(PoolLaw))}")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, less than 1")
        philox.check_address(self.key, 0, 0)
        if self.law == "tied":
            Ties(self.key, self.size)  # refuses a size that is none

    def apply(
        self,
        weight: Tensor,
        name: str,
        seeds: Sequence[int] | NDArray[np.integer],
        coefs: Sequence[float] | NDArray[np.floating],
        *,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """out = scale * weight + sum_k coefs[k] * z_{seeds[k]}; out=None allocates, out=weight works in place.

        weight: any shape and strides, float32, bfloat16 or float16; coefs and scale are rounded to float32 once, the
        sum is formed in float32 and rounded once to weight's dtype. float64 weights are computed in float64, from
        unrounded coefs and the same float32 z. out: weight itself or a tensor of its shape, dtype and device that
        shares no memory with it. Autograd sees nothing of this.

        TypeError on another dtype; ValueError on seeds outside [0, 2^32), on coefs or a scale that are not finite (in
        float32, unless weight is float64), on unequal lengths, and on an out that does not fit.
        """
        if weight.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"{name}: no directions for weights of {weight.dtype}; supported: {known}")
        if out is None:
            out = torch.empty_like(weight, requires_grad=False)
        elif (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
            raise ValueError(
                f"{name}: out is {out.dtype} {tuple(out.shape)} on {out.device}, "
                f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}"
            )
        seeds = philox.check_seeds(seeds)
        precision = np.float64 if weight.dtype == torch.float64 else np.float32
        coefs, scale = (
            _finite(name, "coefs", coefs, precision),
            _finite(name, "scale", scale, precision).item(),
        )
        if seeds.shape != coefs.shape:
            raise ValueError(f"{name}: {seeds.size} seeds but coefs of shape {coefs.shape}")

        source, target = weight.detach(), out.detach()
        if self.law == "tied":
            tied.accumulate(Ties(self.key, self.size), source, target, _stream(name), seeds, coefs, scale)
            return out
        if self.law == "lowrank" and weight.dim() > 1 and weight.numel():
            self._multiply(source, target, name, seeds, coefs, scale)
            return out
        pid = philox.parameter_id(name)
        kernels = _kernels(weight.device) if weight.dtype != torch.float64 else None
        if kernels is not None:
            law = "gaussian" if self.law == "gaussian" else "sign"
            whole = source.is_contiguous() and target.is_contiguous()
            for start, piece, place in [(0, source, target)] if whole else _tiles(source, target):
                flat = piece.reshape(-1)
                moved = place.view(-1) if place.is_contiguous() else torch.empty_like(flat)
                kernels.accumulate(law, flat, moved, self.key, pid, seeds, coefs, float(scale), start)
                if not place.is_contiguous():
                    place.copy_(moved.view(place.shape))
            return out
        direct = weight.dtype == torch.float32 and weight.device.type == "cpu"
        if direct and source.is_contiguous() and target.is_contiguous():
            self._accumulate(source.view(-1).numpy(), target.view(-1).numpy(), pid, seeds, coefs, scale, 0)
            return out

        working = torch.float64 if weight.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            for start, piece, place in _tiles(source, target):
                # a copy always: the kernel works in place on it, and weight may not be out
                tile = torch.empty(piece.shape, dtype=working, device="cpu").copy_(piece)
                numbers = tile.view(-1).numpy()
                self._accumulate(numbers, numbers, pid, seeds, coefs, scale, start)
                place.copy_(tile)
        return out

    def direction(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """z_seed for the parameter `name`, float32 of `shape`; for tests, oracles and vectors."""
        if self.law == "lowrank" and len(shape) > 1 and 0 not in shape:
            left, right = self.factors(name, shape, [seed])
            return (left[0] @ right[0].T / math.sqrt(self.rank)).view(tuple(shape))
        if self.law == "tied":
            ties = Ties(self.key, self.size)
            return torch.from_numpy(tied.direction(ties, _stream(name), math.prod(shape), seed)).view(tuple(shape))
        draw = philox.gaussian if self.law == "gaussian" else sign_cpu.signs
        return torch.from_numpy(draw(self.key, seed, philox.parameter_id(name), 0, math.prod(shape))).view(tuple(shape))

    def factors(
        self, name: str, shape: Sequence[int], seeds: Sequence[int], out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A [seeds, m, rank] and B [seeds, n, rank] of the law lowrank, +1 and -1 in float32; z = A B^T / sqrt(rank).

        Element e of the stream of the parameter's factors belongs to rank e div (m + n), and there to A where
        e mod (m + n) < m, and else to B. out: float32 [rank (m + n), seeds] on the CPU, whose memory they are to use.
        """
        n = shape[-1]
        m = math.prod(shape) // n
        pid, into = philox.parameter_id(f"{name}#factors"), None if out is None else out.numpy()
        drawn = sign_cpu.matrix(self.key, pid, philox.check_seeds(seeds), 0, self.rank * (m + n), into)
        both = torch.from_numpy(drawn).view(self.rank, m + n, len(seeds)).permute(2, 1, 0)
        return both[:, :m], both[:, m:]

    def _multiply(
        self,
        weight: Tensor,
        out: Tensor,
        name: str,
        seeds: NDArray[np.uint64],
        coefs: NDArray[np.floating],
        scale: float,
    ) -> None:
        """The low-rank replay, by rows and last dimension: by tables on a CPU, as matrix products elsewhere."""
        n = weight.shape[-1]
        m = weight.numel() // n
        pid = philox.parameter_id(f"{name}#factors")
        flat = weight.reshape(m, n)
        target = out.view(m, n) if out.is_contiguous() else torch.empty((m, n), dtype=out.dtype, device=out.device)
        spread = (coefs.astype(np.float64) / math.sqrt(self.rank)).astype(coefs.dtype)
        if weight.device.type == "cpu" and weight.dtype != torch.float64:
            self._look_up(flat, target, pid, seeds, spread, scale)
        else:
            self._products(flat, target, pid, seeds, torch.from_numpy(spread).to(weight.device), scale)
        if not out.is_contiguous():
            out.copy_(target.view(out.shape))

    def _look_up(
        self,
        weight: Tensor,
        out: Tensor,
        pid: int,
        seeds: NDArray[np.uint64],
        spread: NDArray[np.floating],
        scale: float,
    ) -> None:
        """By tables, in float32; what is in another dtype passes through a copy of some rows."""
        m, n = weight.shape
        direct = weight.dtype == torch.float32 and weight.is_contiguous()
        rows = m if direct else max(1, TILE // n)
        with torch.no_grad():
            for first in range(0, m, rows):
                piece, place = weight[first : first + rows], out[first : first + rows]
                tile = piece if direct else torch.empty(piece.shape).copy_(piece)
                into = place if direct else tile
                address = self.key, pid, seeds, spread
                table_replay.accumulate(tile.numpy(), into.numpy(), *address, scale, self.rank, first, m)
                if not direct:
                    place.copy_(tile)

    def _products(
        self, weight: Tensor, out: Tensor, pid: int, seeds: NDArray[np.uint64], spread: Tensor, scale: float
    ) -> None:
        """Rank by rank in the columns of one product."""
        m, n = weight.shape
        parts = [
            (i, slice(k, k + matmul_replay.COLUMNS))
            for i in range(self.rank)
            for k in range(0, len(seeds), matmul_replay.COLUMNS)
        ]

        kernels = _kernels(weight.device)

        def factor(part: int, first: int, count: int) -> Tensor:
            i, columns = parts[part]
            address = self.key, pid, seeds[columns], i * (m + n) + first, count
            if kernels is not None:
                made: Tensor = kernels.matrix(*address, device=weight.device)
                return made
            return torch.from_numpy(sign_cpu.matrix(*address)).to(weight.device)

        right: list[Tensor] = [torch.empty(0)] * len(parts)

        def spread_out(part: int) -> None:
            right[part] = factor(part, m, n).to(spread.dtype).mul_(spread[parts[part][1]])

        matmul_replay.one_thread_each([partial(spread_out, part) for part in range(len(parts))])
        matmul_replay.accumulate(weight, out, factor, right, scale)

    def _accumulate(
        self,
        weight: NDArray[np.floating],
        out: NDArray[np.floating],
        pid: int,
        seeds: NDArray[np.uint64],
        coefs: NDArray[np.floating],
        scale: float,
        start: int,
    ) -> None:
        """The kernel of the law on flat CPU arrays."""
        if weight.dtype == np.float64:
            draw = philox.gaussian if self.law == "gaussian" else sign_cpu.signs
            total = np.zeros(weight.size)
            for seed, coef in zip(seeds.tolist(), coefs, strict=True):
                total += coef * draw(self.key, seed, pid, start, weight.size).astype(np.float64)
            np.multiply(weight, scale, out=out)
            if seeds.size:
                out += total
        else:
            kernel = gaussian_cpu if self.law == "gaussian" else sign_cpu
            kernel.accumulate(weight, out, self.key, pid, seeds, coefs, scale, start)


def _stream(name: str) -> int:
    """The stream of the law tied, where no other law draws."""
    return philox.parameter_id(f"{name}#ties")


def _kernels(device: torch.device) -> Any:
    """What has `accumulate` and `matrix` for tensors there; None on the CPU, whose kernels take numpy's arrays."""
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        with contextlib.suppress(ImportError):  # without Triton, plain torch does it
            from thinwire.perturb import triton_kernels

            return triton_kernels
    return torch_kernels


def _finite(name: str, what: str, values: object, precision: type[np.floating]) -> NDArray[np.floating]:
    """`values` rounded to `precision`; ValueError where that is not finite."""
    with np.errstate(over="ignore"):
        array = np.asarray(values, dtype=np.float64).astype(precision)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {what} must be finite in {np.dtype(precision).name}")
    return array


def _tiles(source: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Slices of two tensors of one shape, with the row-major index of their first element; about TILE elements each.

    Tensors that are not contiguous are cut along their first dimension, and one row is then the least.
    """
    if source.numel() == 0:
        return
    if source.is_contiguous() and target.is_contiguous():
        source, target = source.view(-1), target.view(-1)
    elif source.dim() == 0:
        source, target = source.view(1), target.view(1)
    row = source.numel() // source.shape[0]
    rows = max(1, TILE // row)
    for first in range(0, source.shape[0], rows):
        yield first * row, source[first : first + rows], target[first : first + rows]
