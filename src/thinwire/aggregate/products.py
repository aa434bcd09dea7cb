"""Products of thin factors: their sum to the bit on every machine, and the best factors of it, never formed.

Factors lie rank first: left [rank, in], right [rank, out], and stand for the matrix right^T left [out, in].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from numba import njit
from torch import Tensor


class Pair(NamedTuple):
    """left [rank, in] and right [rank, out], of any float dtype."""

    left: Tensor
    right: Tensor

    def double(self) -> Pair:
        """In float64, on the CPU."""
        return Pair(self.left.detach().cpu().double(), self.right.detach().cpu().double())


@njit(nogil=True, cache=True)
def add_outer(a, b, out):
    """out += a^T b for [r, m] and [r, n], each sum in the order of r: the same bits on any CPU.

    On one thread: numba's own threads would set how many OpenMP gives to torch.
    """
    for i in range(out.shape[0]):
        row = out[i]
        for k in range(a.shape[0]):
            factor, other = a[k, i], b[k]
            for j in range(row.size):
                row[j] += factor * other[j]


def added(matrix: Tensor, pair: Pair, shares: Tensor) -> Tensor:
    """matrix + sum_j shares_j right_j left_j^T in float64, rounded once, to the matrix's dtype, on the CPU.

    matrix: [out, in]; shares: [rank]. The same bits on any CPU.
    """
    out = matrix.detach().cpu().double().contiguous().clone()
    left, right = pair.double()
    add_outer((shares.double()[:, None] * right).contiguous().numpy(), left.contiguous().numpy(), out.numpy())
    return out.to(matrix.dtype)


def decomposed(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """U^T [k, out], s [k], V^T [k, in] of the product right^T left, float64, k = min(rank, out, in).

    Of an SVD of a core of the size of the rank between the factors' own bases: the product is never formed.
    """
    left, right = pair.double()
    inner, left_core = torch.linalg.qr(left.T)
    outer, right_core = torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(right_core @ left_core.T, full_matrices=False)
    return (outer @ u).T, values, vh @ inner.T


def best(pair: Pair, rank: int) -> Pair:
    """The factors of the best approximation of that rank (Eckart and Young): left = V^T, right = S U^T; float64.

    Where the product has a lower rank, the other rows of `right` are 0. ValueError for a pair of fewer rows.
    """
    if pair.left.shape[0] < rank:
        raise ValueError(f"{pair.left.shape[0]} rows have no {rank} directions")
    u, values, v = decomposed(pair)
    return Pair(v[:rank], values[:rank, None] * u[:rank])


def best_of(matrix: Tensor, rank: int) -> Pair:
    """The same of a whole matrix [out, in]."""
    u, values, vh = torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False)
    return Pair(vh[:rank], values[:rank, None] * u.T[:rank])


def weighed(rows: Tensor, shares: Tensor, clients: int) -> Tensor:
    """sum_i shares_i rows_i of the equally many rows of each client: [clients * rank, n] to [rank, n], float64."""
    each = (shares.double()[:, None] * rows.detach().cpu().double()).reshape(clients, -1, rows.shape[1])
    return each.sum(0)


def norm(pair: Pair) -> float:
    """The Frobenius norm of the product, which is not formed: |right^T left|^2 = trace(left left^T right right^T)."""
    left, right = pair.double()
    return math.sqrt(max(0.0, float(((left @ left.T) * (right @ right.T)).sum())))


def joined(pair: Pair, other: Pair) -> Pair:
    """The rows of both: the sum of their products, in float64."""
    return Pair(*(torch.cat(sides) for sides in zip(pair.double(), other.double(), strict=True)))
