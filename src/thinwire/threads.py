"""The threads that share a sweep over weights: which takes what does not change a bit of it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

TILE = 2048
"""Elements in a tile, a power of two: its blocks never straddle the carry into the counter's 2nd word."""
CHUNK = 32 * TILE
"""Elements that a thread takes at a time; chunks begin at multiples of it from element 0 of the parameter."""
ALONE = 1 << 20
"""Elements times seeds below which a second thread takes more than it gives."""


@cache
def pool(workers: int) -> ThreadPoolExecutor:
    """The threads that help the calling one; started on first use and kept."""
    return ThreadPoolExecutor(workers, thread_name_prefix="thinwire")


# a forked child inherits the pool objects without their threads, and would wait for them for ever
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


def threads_for(size: int, seeds: int) -> int:
    """How many threads share the work where nobody sets it: torch's, but one alone where there is little of it.

    torch's own threads spin for a while after each of its operations, and one of ours that wakes then has to wait.
    """
    return torch.get_num_threads() if size * seeds >= ALONE else 1


def share(sweep: Callable[[int, int], None], start: int, size: int, threads: int, chunk: int = CHUNK) -> None:
    """sweep(low, high) over slices that make up 0 .. size, cut where start + low is a multiple of `chunk`."""
    if size <= chunk or threads <= 1:
        sweep(0, size)
        return
    # taking from the left of a deque is atomic, so the threads share it without a lock
    waiting = deque(range(start // chunk * chunk, start + size, chunk))

    def work() -> None:
        while True:
            try:
                place = waiting.popleft()
            except IndexError:
                return
            sweep(max(start, place) - start, min(start + size, place + chunk) - start)

    helpers = [pool(threads - 1).submit(work) for _ in range(min(threads, len(waiting)) - 1)]
    try:
        work()
    finally:
        # even on an interrupt, do not return while a thread still writes
        waiting.clear()
        for helper in helpers:
            helper.result()
