"""Time of a probe (both signs) under each law against two plain forward passes, on SmolLM2-135M, 4 x 128 tokens.

    python benchmarks/probe.py [--json FILE]

Each is measured five times, in turn; the shortest time counts. `together`: both signs in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import get_args

import torch
from rows import Row, finish

from thinwire.data.batch import Example, collate
from thinwire.keys import Key
from thinwire.model.flat import Net
from thinwire.perturb.directions import Directions, Law
from thinwire.perturb.probe import Probe
from thinwire.train.objective import loss

ROWS, LENGTH, TURNS = 4, 128, 5


def main() -> None:
    """Time all laws."""
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
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(TURNS + 1):  # the first turn compiles and allocates
        for name, run in runs.items():
            begin = perf_counter()
            run()
            best[name] = min(best[name], perf_counter() - begin)
    finish([Row(name, best[name], best["plain"], "s") for name in runs if name != "plain"])


if __name__ == "__main__":
    main()
