"""A matrix by its leading directions: truncated SVD, and PowerSGD (Vogels et al., 2019, arXiv:1905.13727).

    svd        x ~ U_k S_k V_k^T, the best of rank k; P = U_k sqrt(S_k), Q = V_k sqrt(S_k) travel
    powersgd   P <- x Q, its columns made orthonormal, Q <- x^T P; Q starts from what the last update ended with (warm
               start), so that one step a round is enough. Exact for a matrix of rank k after two steps

Both halves travel in 8 bits an element with a bfloat16 scale a column, at 1 % of error, far below what the rank loses:
a quarter of the bytes of the published float32. Biased: use them with error feedback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import check_key, flatten


@dataclass(frozen=True)
class PowerSgd:
    """Rank `rank` of a matrix. `steps`: of the power iteration; 0 is the SVD itself."""

    rank: int
    steps: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 0:
            raise ValueError(f"rank {self.rank} must be 1 at least, and steps {self.steps} not negative")

    @classmethod
    def within(cls, size: int, shape: tuple[int, int], steps: int = 1) -> PowerSgd:
        """The largest rank of which a matrix of this shape takes at most `size` bytes; ValueError where even 1 does."""
        rank = min(size // (sum(shape) + 4), *shape)
        if rank < 1:
            raise ValueError(f"{size} bytes hold no direction of a matrix of {shape[0]} x {shape[1]}")
        return cls(rank, steps)

    def size(self, shape: tuple[int, int]) -> int:
        """The bytes of a matrix of this shape, exactly."""
        return sum(Blocks(8, block=side).size(side * self.rank) for side in shape)

    def start(self, shape: tuple[int, int], key: int) -> Tensor:
        """Directions to start from where there are none yet, float32 [columns, rank], drawn from the key."""
        draw = torch.Generator().manual_seed(key % 2**63)
        return torch.randn(shape[1], self.rank, generator=draw)

    def encode(self, x: Tensor, key: int, start: Tensor | None = None) -> bytes:
        """Float32 [rows, columns] as `size` bytes, from `start` or the key's directions; ValueError unless finite."""
        check_key(key)
        flatten(x)
        if self.steps == 0:
            left, values, right = torch.linalg.svd(x, full_matrices=False)
            root = values[: self.rank].sqrt()
            p, q = left[:, : self.rank] * root, right[: self.rank].T * root
        else:
            q = self.start((x.shape[0], x.shape[1]), key) if start is None else start
            for _ in range(self.steps):
                p, _ = torch.linalg.qr(x @ q)
                q = x.T @ p
        halves = (p.T, q.T)  # a direction's numbers side by side, under one scale
        return b"".join(Blocks(8, block=half.shape[1]).encode(half.contiguous(), 0) for half in halves)

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The matrix back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        p, q = self.halves(data, (shape[0], shape[1]))
        found = p @ q.T
        flatten(found)  # two scales near the end of float32 have a product beyond it
        return found

    def halves(self, data: bytes | memoryview, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What travelled: float32 [rows, rank] and [columns, rank]; the second is the next update's start."""
        if len(data) != self.size(shape):
            raise ValueError(f"{len(data)} bytes for rank {self.rank} of {list(shape)}, expected {self.size(shape)}")
        split = Blocks(8, block=shape[0]).size(shape[0] * self.rank)
        body = memoryview(data)
        p = Blocks(8, block=shape[0]).decode(body[:split], (self.rank, shape[0]), 0)
        q = Blocks(8, block=shape[1]).decode(body[split:], (self.rank, shape[1]), 0)
        return p.T, q.T
