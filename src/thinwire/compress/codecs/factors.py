"""A matrix as a product of two thin ones in few bits: what local training changes in a layer is close to low rank.

    x ~ A B^T,   A [m, r] its r leading directions (randomised range finder, Halko, Martinsson and Tropp 2011), coded;
    B = x^T A (A^T A)^-1, the best for A as it was coded; then coded too

Twenty AdamW steps on four rows leave half to three quarters of the energy of a layer's change in eight directions,
where the largest 3 % of its elements hold 15 %. Biased: use it with error feedback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import check_key, elements, flatten

SWEEPS = 2
"""Products with x and x^T before the directions are taken; a third changes the energy found by less than 1 %."""
BLOCK = 64
"""Elements under one scale: directions differ in size, and a layer's rows do."""


@njit(nogil=True, cache=True)
def _product(a, b, out):
    """out = a^T b for float32 [r, m] and [r, n], each sum in the order of r: the same bits on any CPU.

    On one thread: numba's own threads would set how many OpenMP gives to torch.
    """
    for i in range(out.shape[0]):
        row = out[i]
        row[:] = 0
        for k in range(a.shape[0]):
            factor, other = a[k, i], b[k]
            for j in range(row.size):
                row[j] += factor * other[j]


@dataclass(frozen=True)
class Factors:
    """The `rank` leading directions of a matrix, their elements in `bits` (8, 4, 2) each; all else in 8 bits.

    A tensor of more than two dimensions is a matrix of its first by the others. One that is no smaller as factors than
    in 8 bits an element (a vector, a narrow matrix) is coded so. Bytes: A^T and B^T, each as Blocks of 64. Decoding
    gives the same bits on every machine, encoding only on one CPU type.
    """

    rank: int
    bits: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits {self.bits} is not one of 2, 4, 8")

    def size(self, shape: Sequence[int]) -> int:
        """The bytes of a tensor of this shape, exactly."""
        whole, sides = Blocks(8, BLOCK).size(elements(shape)), self._sides(shape)
        return whole if sides is None else sum(self._code.size(self.rank * side) for side in sides)

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as `size` bytes; the key, in [0, 2^64), draws where the search starts.

        ValueError unless x is finite float32 on the CPU.
        """
        check_key(key)
        flatten(x)
        sides = self._sides(x.shape)
        if sides is None:
            return Blocks(8, BLOCK).encode(x, key)
        matrix = x.detach().reshape(sides)
        if not (top := float(matrix.abs().max())):
            return self._code.encode(torch.zeros(self.rank, sides[0]), 0) + self._code.encode(
                torch.zeros(self.rank, sides[1]), 0
            )
        matrix = matrix / top  # squares of updates near 1e-20 and of huge ones stay in range
        left = self._code.encode(self._directions(matrix, key), 0)
        a = self._code.decode(left, (self.rank, sides[0]), 0)
        # with a little of the identity: directions beyond the matrix's rank are zero, and stay so
        gram = (a @ a.T).double()
        gram += torch.eye(self.rank, dtype=torch.float64) * (1e-7 * float(gram.trace()) / self.rank + 1e-30)
        b = torch.linalg.solve(gram, (a @ matrix).double()).float() * top
        if not torch.isfinite(b).all():
            raise ValueError("an element is too large to be coded as factors")
        return left + self._code.encode(b.contiguous(), 0)

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        sides = self._sides(shape)
        if sides is None:
            return Blocks(8, BLOCK).decode(data, shape, key)
        if len(data) != self.size(shape):
            raise ValueError(f"{len(data)} bytes for rank {self.rank} of {list(shape)}, expected {self.size(shape)}")
        body, split = memoryview(data), self._code.size(self.rank * sides[0])
        a = self._code.decode(body[:split], (self.rank, sides[0]), 0)
        b = self._code.decode(body[split:], (self.rank, sides[1]), 0)
        out = np.empty(sides, np.float32)
        _product(a.numpy(), b.numpy(), out)
        found = torch.from_numpy(out)
        flatten(found)  # finite
        return found.reshape(tuple(shape))

    @property
    def _code(self) -> Blocks:
        return Blocks(self.bits, BLOCK)

    def _sides(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """The matrix that a tensor of this shape is, or None where its factors would not be smaller than itself."""
        if len(shape) < 2 or not (count := elements(shape)):
            return None
        sides = (shape[0], count // shape[0])
        factors = sum(self._code.size(self.rank * side) for side in sides)
        return sides if factors < Blocks(8, BLOCK).size(count) and self.rank <= min(sides) else None

    def _directions(self, x: Tensor, key: int) -> Tensor:
        """A^T: the leading left directions times the roots of their sizes, float32 [rank, m]."""
        draw = torch.Generator().manual_seed(key % 2**63)
        basis = torch.randn(x.shape[1], min(self.rank + 4, *x.shape), generator=draw)
        for _ in range(SWEEPS):
            basis, _ = torch.linalg.qr(x.T @ torch.linalg.qr(x @ basis)[0])
        left, values, _ = torch.linalg.svd(x @ basis, full_matrices=False)
        found: Tensor = left[:, : self.rank] * values[: self.rank].sqrt()
        return found.T.contiguous()
