"""Replay of low-rank directions: scale w + sum_k c_k A_k B_k^T, one matrix product for each tile of rows.

Each tile is one product on one thread, and the tiles are the same whatever the number of threads: so are the bits, on
one type of CPU. Between types matrix products differ in their last bits, within 1e-6 of the weights' change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from thinwire.perturb.cpu import _pool

FEW = 4
"""Up to so many columns, outer products one by one are faster than a matrix product."""
ROWS = 512
"""Rows of a tile: its product with 4,096 seeds is large enough for full speed, and its factor is 8 MB."""


def accumulate(
    weight: Tensor, out: Tensor, left: Callable[[int, int], Tensor], right: Tensor, coefs: Tensor, scale: float
) -> None:
    """out = scale * weight + (A * coefs) B^T, formed in float32 (float64 for such weights) and rounded once.

    weight, out: [m, n] of one dtype, any strides; out is weight or shares no memory with it. left(first, count): rows
    first .. first + count of A, float32 [count, k]. right: B, float32 [n, k]. coefs: [k].
    """
    working = torch.float64 if weight.dtype == torch.float64 else torch.float32
    right, coefs = right.to(working), coefs.to(working)

    def tile(first: int) -> None:
        rows = slice(first, min(first + ROWS, len(weight)))
        if len(coefs) == 0:
            out[rows] = scale * weight[rows].to(working)
            return
        factor = left(first, rows.stop - first).to(working) * coefs
        # always in row-major order, for a product's last bits may depend on the strides
        here, there = weight[rows].to("cpu", working).contiguous(), out[rows]
        if len(coefs) <= FEW:
            total = here if scale == 1 else here * scale
            for i in range(len(coefs)):
                total = torch.addcmul(total, factor[:, i : i + 1], right[:, i])
            there.copy_(total)
        elif there.dtype == working and there.device.type == "cpu" and there.is_contiguous():
            torch.addmm(here, factor, right.T, beta=scale, out=there)
        else:
            there.copy_(torch.addmm(here, factor, right.T, beta=scale))

    one_thread_each([partial(tile, first) for first in range(0, len(weight), ROWS)])


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
        for done in [_pool(threads).submit(torch.no_grad()(task)) for task in tasks]:
            done.result()


class _SingleThread:
    """torch's own parallelism off for the length of a block."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
