"""The threads that share a sweep over weights: which takes what does not change a bit of it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from thinwire.perturb.philox import BLOCK

TILE_BLOCKS = 256
"""Blocks in a tile, a multiple of 32 and a power of two: it never straddles the carry into the counter's 2nd word."""
TILE = TILE_BLOCKS * BLOCK
CHUNK = 32 * TILE
"""Elements that a thread takes at a time; chunks begin at multiples of it from element 0 of the parameter."""
ALONE = 1 << 20
"""Elements times seeds below which a second thread takes more than it gives."""


@cache
def pool(workers: int) -> ThreadPoolExecutor:
    """The threads that help the calling one; started on first use and kept."""
    return ThreadPoolExecutor(workers, thread_name_prefix="thinwire-perturb")


# a forked child inherits the pool objects without their threads, and would wait for them for ever
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


def threads_for(size: int, seeds: int) -> int:
    """How many threads share the work where nobody says: torch's, but one alone where there is little of it.

    torch's own threads spin for a while after each of its operations, and one of ours that wakes then has to wait.
    """
    return torch.get_num_threads() if size * seeds >= ALONE else 1


def share(sweep: Callable[[int, int], None], start: int, size: int, threads: int) -> None:
    """sweep(low, high) over slices that make up 0 .. size, cut where start + low is a multiple of CHUNK."""
    if size <= CHUNK or threads <= 1:
        sweep(0, size)
        return
    # taking from the left of a deque is atomic, so the threads share it without a lock
    waiting = deque(range(start // CHUNK * CHUNK, start + size, CHUNK))

    def work() -> None:
        while True:
            try:
                chunk = waiting.popleft()
            except IndexError:
                return
            sweep(max(start, chunk) - start, min(start + size, chunk + CHUNK) - start)

    helpers = [pool(threads - 1).submit(work) for _ in range(min(threads, len(waiting)) - 1)]
    try:
        work()
    finally:
        # even on an interrupt, do not return while a thread still writes
        waiting.clear()
        for helper in helpers:
            helper.result()
