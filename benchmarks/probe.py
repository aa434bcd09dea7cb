"""Time and memory of a probe (both signs) and a rebuild against plain forward passes, SmolLM2-135M, 4 x 128 tokens.

    python benchmarks/probe.py [--json FILE]

Time: against two plain passes, each measured twelve times, in turn; the median counts. `together`: both signs in
one forward pass. The rebuild is that of the whole model from 4,096 seeds of the low-rank law, against one pass; once.
Memory: each in a process of its own, its peak resident less what is resident after the imports, against the same of
two plain passes. The kernels' compiled code (50 MB with numba's own) is loaded with the imports; CODE separates it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import get_args

import torch
from rows import Row, finish

from thinwire import memory
from thinwire.data.batch import Example, collate
from thinwire.keys import Key
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions, Law
from thinwire.perturb.pool import Pool
from thinwire.perturb.probe import Probe
from thinwire.train.objective import loss

ROWS, LENGTH, TURNS, SEEDS = 4, 128, 12, 4096
CODE = "the kernels' code"


def passes() -> dict[str, Callable[[], None]]:
    """What is measured, by name; the model is loaded once for all of them."""
    net = Net.open("smollm2-135m-instruct")
    tokens = Key.root(0).integers(40_000, ROWS * LENGTH).reshape(ROWS, LENGTH).tolist()
    batch = collate([Example(tuple(row[:-8]), tuple(row[-8:])) for row in tokens], 0)

    def plain() -> None:
        with torch.no_grad():
            loss(net.model, batch)
            loss(net.model, batch)

    def probe(law: Law, together: bool) -> None:
        with Probe(net, Directions(1, law), together) as probe:
            probe.losses(batch, [3], 1e-3)

    runs: dict[str, Callable[[], None]] = {"plain": plain}
    for law in get_args(Law):
        for together in (False, True):
            name = f"probe, {law}{', together' if together else ''}"
            runs[name] = lambda law=law, together=together: probe(law, together)

    def rebuild_all() -> None:
        Pool(Directions(1, "lowrank"), SEEDS).rebuild(net, torch.linspace(-1e-4, 1e-4, SEEDS))

    return {**runs, "rebuild": rebuild_all}


def load_kernels() -> None:
    """Have the compiled code in memory."""
    for law in get_args(Law):
        Directions(1, law).apply(torch.zeros(64, 64), "any", [3], [1.0])


def peak(name: str) -> int:
    """Bytes at the peak of one of them, in this process; of `code` what loading the kernels takes."""
    if name == CODE:
        before = memory.resident()
        load_kernels()
        return memory.resident() - before
    load_kernels()
    before = memory.resident()
    run = passes()[name]
    memory.reset()
    run()
    return memory.peak() - before


def main() -> None:
    """Time all, and weigh all."""
    if "--peak" in sys.argv:
        print(peak(sys.argv[-1]))  # noqa: T201
        return
    command = [sys.executable, __file__, "--peak"]
    runs = passes()
    whole = runs.pop("rebuild")
    bytes_of = {
        name: int(subprocess.run([*command, name], check=True, capture_output=True).stdout) / 1e6
        for name in (*runs, CODE)
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS + 1):
        for name, run in runs.items():
            begin = perf_counter()
            run()
            taken[name].append(perf_counter() - begin)
    # The first turn compiles and allocates. A median, for a machine's fast moments do not come to all of them alike.
    usual = {name: median(seconds[1:]) for name, seconds in taken.items()}
    begin = perf_counter()
    whole()
    seconds = perf_counter() - begin
    del runs["plain"]
    times = [Row(name, usual[name], usual["plain"], "s") for name in runs]
    times.append(Row(f"rebuild from {SEEDS} seeds, lowrank, against one pass", seconds, usual["plain"] / 2, "s"))
    finish([*times, *(Row(f"{name}: peak memory", bytes_of[name], bytes_of["plain"], "MB") for name in (*runs, CODE))])


if __name__ == "__main__":
    main()
