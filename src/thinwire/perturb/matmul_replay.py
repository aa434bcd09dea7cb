"""Replay of low-rank directions: scale w + sum_k c_k A_k B_k^T, one matrix product for each tile of rows.

Each tile is one product on one thread, and the tiles are the same whatever the number of threads: so are the bits, on
one type of CPU. Between types matrix products differ in their last bits, within 1e-6 of the weights' change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from thinwire.threads import pool

FEW = 4
"""Up to so many columns, outer products one by one are faster than a matrix product."""
ROWS, COLUMNS = 384, 1024
"""Of a tile of A at most: its product with B is large enough for full speed, and it lies in the cache."""


def accumulate(
    weight: Tensor, out: Tensor, left: Callable[[int, int, int], Tensor], right: list[Tensor], scale: float
) -> None:
    """out = scale * weight + sum_i A_i B_i^T in the order of i, formed in float32 (float64 for such weights).

    weight, out: [m, n] of one dtype, any strides; out is weight or shares no memory with it. left(i, first, count):
    rows first .. first + count of A_i, float32 [count, k_i], k_i at most COLUMNS. right: B_i, [n, k_i].
    """
    working = torch.float64 if weight.dtype == torch.float64 else torch.float32
    right = [each.to(working) for each in right]

    def tile(first: int, size: int) -> None:
        rows = slice(first, min(first + size, len(weight)))
        # always in row-major order, for a product's last bits may depend on the strides
        here, there = weight[rows].to(working).contiguous(), out[rows]
        direct = there.dtype == working and there.is_contiguous()
        total = there if direct else torch.empty_like(here)
        torch.mul(here, scale, out=total)
        for i, columns in enumerate(right):
            factor = left(i, first, rows.stop - first).to(working)
            if columns.shape[1] > FEW:
                total.addmm_(factor, columns.T)
            else:
                for k in range(columns.shape[1]):
                    total.addcmul_(factor[:, k : k + 1], columns[:, k])
        if not direct:
            there.copy_(total)

    # an even number of even tiles, whatever the threads: most matrices have few, and two threads then end together
    size = -(-len(weight) // max(2, 2 * -(-len(weight) // (2 * ROWS))))
    one_thread_each([partial(tile, first, size) for first in range(0, len(weight), size)])


def one_thread_each(tasks: list[Callable[[], None]]) -> None:
    """Run the tasks on as many threads as torch has, each task's own products on one."""
    threads = torch.get_num_threads()
    if threads == 1 or len(tasks) == 1:
        # a product of one tile on several threads might be summed in another order
        with _SingleThread():
            for task in tasks:
                task()
        return
    with _SingleThread():
        for done in [pool(threads).submit(torch.no_grad()(task)) for task in tasks]:
            done.result()


class _SingleThread:
    """torch's own parallelism off for the length of a block."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
