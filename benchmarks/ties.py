"""Time of both passes of the tied map over bfloat16 weights, against a copy of as many.

    python benchmarks/ties.py [--elements N ...] [--json FILE]

`spread` rebuilds N weights (134 million and 1.1 billion if not given) from 32,768 numbers into another tensor, and
into the start itself; the reference is `out.copy_(start)` on as many threads. `collect` sums a gradient of N entries
into the numbers; the reference is the same copy. All sides are measured on one thread and on two, five times, in turn;
the shortest time counts.
"""

from __future__ import annotations

import sys
from time import perf_counter

import torch
from rows import Row, finish

from thinwire.model.views.ties import Ties

ELEMENTS = (134_515_008, 1_100_000_000)
NUMBERS = 32_768
REPEATS = 5


def sizes() -> list[int]:
    """What the command line asks for."""
    if "--elements" not in sys.argv:
        return list(ELEMENTS)
    given = sys.argv[sys.argv.index("--elements") + 1 :]
    return [int(text) for text in given[: next((i for i, text in enumerate(given) if text[0] == "-"), len(given))]]


def main() -> None:
    """Time the passes and the copy."""
    ties, theta, into = Ties(7, NUMBERS), torch.linspace(-1e-3, 1e-3, NUMBERS), torch.zeros(NUMBERS)
    rows = []
    for elements in sizes():
        # page by page in memory before the clock runs, as the weights of a model are
        start, out = torch.full((elements,), 0.5, dtype=torch.bfloat16), torch.zeros(elements, dtype=torch.bfloat16)
        passes = {
            "copy": lambda start=start, out=out: out.copy_(start),
            "spread": lambda start=start, out=out: ties.spread(theta, 1, start, out),
            "spread in place": lambda out=out: ties.spread(theta, 1, out, out),
            "collect": lambda start=start: ties.collect(start, 1, into),
        }
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = dict.fromkeys(passes, float("inf"))
            for _ in range(REPEATS):
                for what, act in passes.items():
                    begin = perf_counter()
                    act()
                    found[what] = min(found[what], (perf_counter() - begin) / elements * 1e9)
            for what in list(passes)[1:]:
                name = f"{what}, {elements / 1e6:,.0f} M weights, {threads} thread{'s' * (threads > 1)}: a weight"
                rows.append(Row(name, found[what], found["copy"], "ns"))
    finish(rows)


if __name__ == "__main__":
    main()
