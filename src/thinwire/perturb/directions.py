"""The directions of a run, as methods use them: torch tensors in, torch tensors out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.perturb import cpu, philox

TILE = 1 << 20
"""Elements of the float32 copy through which weights pass that the kernel cannot take as they are."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Directions:
    """The finite pool of directions of a run: z_s for every seed s in [0, 2^32), one array for each parameter name.

    `key` is the 64-bit run key. Element e of a direction belongs to the e-th element of the parameter in row-major
    order, whatever the strides of the tensor that holds it.
    """

    key: int
    law: Literal["gaussian"] = "gaussian"

    def __post_init__(self) -> None:
        if self.law != "gaussian":
            raise ValueError(f"unknown law {self.law!r}; known: gaussian")
        philox.check_address(self.key, 0, 0)

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
        pid = philox.parameter_id(name)
        direct = weight.dtype == torch.float32 and weight.device.type == "cpu"
        if direct and source.is_contiguous() and target.is_contiguous():
            self._accumulate(source.view(-1).numpy(), target.view(-1).numpy(), pid, seeds, coefs, scale, 0)
            return out

        working = torch.float64 if weight.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            for start, piece, place in _tiles(source, target):
                # a copy always: the kernel works in place on it, and weight may not be out
                tile = torch.empty(piece.shape, dtype=working, device="cpu").copy_(piece)
                flat = tile.view(-1).numpy()
                self._accumulate(flat, flat, pid, seeds, coefs, scale, start)
                place.copy_(tile)
        return out

    def direction(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """z_seed for the parameter `name`, float32 of `shape`; for tests and oracles."""
        z = philox.gaussian(self.key, seed, philox.parameter_id(name), 0, math.prod(shape))
        return torch.from_numpy(z).view(tuple(shape))

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
        """The kernel of the law on flat CPU arrays; a further law branches here."""
        if weight.dtype == np.float64:
            total = np.zeros(weight.size)
            for seed, coef in zip(seeds.tolist(), coefs, strict=True):
                total += coef * philox.gaussian(self.key, seed, pid, start, weight.size).astype(np.float64)
            np.multiply(weight, scale, out=out)
            if seeds.size:
                out += total
        else:
            cpu.accumulate(weight, out, self.key, pid, seeds, coefs, scale, start)


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
