"""Time of a replay, for each parameter and seed, against the loop that the equations suggest.

    python benchmarks/replay.py [--elements N] [--json FILE]

Ours adds the directions of all seeds to one float32 weight of N elements (8 million if not given): 4096 seeds of the
sign law and of the low-rank one (r = 1, making of the factors included), 64 of the Gaussian one. The reference is for
each seed `torch.manual_seed`, `torch.normal` into a tensor, and `add_` with the seed's coefficient; it needs the same
time for every seed, and is given 16. Both sides are measured on one thread and on two, three times, in turn; the
shortest time counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from rows import Row, finish

from thinwire.perturb import gaussian_cpu, sign_cpu
from thinwire.perturb.directions import Directions

SEEDS = {"sign": 4096, "lowrank": 4096, "gaussian": 64}
WIDTH = 576  # columns of the weight, as in SmolLM2-135M
REFERENCE_SEEDS = 16
REPEATS = 3


def nanoseconds(replay: Callable[[int], None], elements: int, seeds: int) -> float:
    """One replay of `seeds` seeds, for each parameter and seed."""
    begin = perf_counter()
    replay(seeds)
    return (perf_counter() - begin) / elements / seeds * 1e9


def main() -> None:
    """Time both laws and the reference."""
    elements = int(sys.argv[sys.argv.index("--elements") + 1]) if "--elements" in sys.argv else 8_000_000
    # page by page in memory before the clock runs, as the weights of a model are
    weight = np.full(elements, 0.5, np.float32)
    tensor, direction = torch.from_numpy(weight), torch.zeros(elements)
    kernels = {"sign": sign_cpu.accumulate, "gaussian": gaussian_cpu.accumulate}
    matrix, lowrank = tensor[: elements // WIDTH * WIDTH].view(-1, WIDTH), Directions(1, "lowrank")

    def coefs(seeds: int) -> NDArray[np.float32]:
        return np.linspace(-1e-3, 1e-3, seeds, dtype=np.float32)

    def reference(seeds: int) -> None:
        for seed, coef in enumerate(coefs(seeds).tolist()):
            torch.manual_seed(seed)
            torch.normal(0.0, 1.0, (elements,), out=direction)
            tensor.add_(direction, alpha=coef)

    def ours(law: str) -> Callable[[int], None]:
        if law == "lowrank":
            return lambda seeds: lowrank.apply(matrix, "w", np.arange(seeds), coefs(seeds), out=matrix)  # type: ignore[return-value]
        return lambda seeds: kernels[law](weight, weight, 1, 2, np.arange(seeds), coefs(seeds))

    for kernel in kernels.values():
        # a few elements, for what is compiled or loaded on first use
        kernel(weight[:1], weight[:1], 1, 2, [1, 2], [0.0, 0.0])

    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found: dict[str, float] = {}
        for _ in range(REPEATS):
            measured = {"reference": nanoseconds(reference, elements, REFERENCE_SEEDS)}
            measured |= {law: nanoseconds(ours(law), elements, seeds) for law, seeds in SEEDS.items()}
            found = {what: min(time, found.get(what, time)) for what, time in measured.items()}
        for law, seeds in SEEDS.items():
            name = f"replay of {seeds} seeds, {law} law, {threads} thread{'s' if threads > 1 else ''}"
            rows.append(Row(f"{name}: time for each parameter and seed", found[law], found["reference"], "ns"))
    finish(rows)


if __name__ == "__main__":
    main()
