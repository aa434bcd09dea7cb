"""What products in bfloat16 bring on a CPU: seconds of a visit over float32's, and the loss after ten rounds.

    python benchmarks/autocast.py seconds [--pairs 3]
    python benchmarks/autocast.py loss [--seeds 0 1 2]

Seconds: visits of a client with and without `model.autocast`, one after the other in one process, the least of each;
one thread. Loss: the film desk on MiniLM, four clients, ten rounds, 400 held-out rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from thinwire import assemble, config
from thinwire.records import read_records
from thinwire.runtime.course import Course, Watch

LORA = {"kind": "lora", "rank": 8, "alpha": 16.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {  # model, view, method, tokens of a row
    "minilm, FedIT": ("minilm", LORA | {"targets": ["query", "value"]}, {"name": "fedavg", "lr": 2e-3}, 32),
    "minilm, FedAvg": ("minilm", {"kind": "full"}, {"name": "fedavg", "lr": 1e-4}, 32),
    "smollm2-135m, FedIT": ("smollm2-135m-instruct", LORA, {"name": "fedavg", "lr": 2e-3}, 128),
    "smollm2-135m, FedAvg": ("smollm2-135m-instruct", {"kind": "full"}, {"name": "fedavg", "lr": 5e-5}, 128),
    "smollm2-135m, FedKSeed": ("smollm2-135m-instruct", {"kind": "full"}, {"name": "fedkseed", "lr": 1e-3}, 128),
}


def run_of(case: str, rounds: int, seed: int, autocast: bool, **fields: Any) -> config.Run:
    """The run of a case: rows of the film desk, or on a causal model whatever fills them."""
    model, view, method, length = CASES[case]
    shown = (
        {}
        if model == "minilm"
        else {"prompt": "{input} Class:", "answer": " {output}", "pack": method["name"] == "fedavg"}
    )
    return config.parse(
        {
            "seed": seed,
            "rounds": rounds,
            "threads": 1,
            "model": {"path": model, "view": view, "autocast": autocast},
            "data": {"path": "film-desk", "clients": 4, "heldout": 400, "rows": 1600, "max_length": length, **shown},
            "method": {"steps": 4, "batch_size": 8, **method},
            "eval": {"rows": 400 if model == "minilm" else 8, "batch_size": 64},
            **fields,
        },
        "the benchmark",
    )


def done(run: config.Run) -> tuple[list[float], list[float]]:
    """The seconds of each visit, and the held-out losses at the start and at the end."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        place.mkdir()
        course = Course(assemble.begin(*assemble.prepared(run)).job(place, Watch()))
        course.begin()
        while not course.ended:
            course.round()
        seconds = [visit["seconds"] for row in read_records(course.rounds) for visit in row["clients"]]
        return seconds, [row["loss"] for row in read_records(course.evals) if row["split"] == "heldout"]


def seconds(pairs: int) -> None:
    """Print a line a case."""
    for case in CASES:
        least = {False: float("inf"), True: float("inf")}
        for _ in range(pairs):
            for autocast in least:
                cohort = [{"kind": "uniform", "n": 1}]
                found, _ = done(run_of(case, 3, 0, autocast, cohort=cohort))
                least[autocast] = min(least[autocast], *found)
        print(  # noqa: T201
            f"| {case} | {least[False]:.2f} | {least[True]:.2f} | {least[False] / least[True]:.2f}x |", flush=True
        )


def loss(seeds: list[int]) -> None:
    """Print a line a case on MiniLM."""
    for case in [case for case in CASES if case.startswith("minilm")]:
        ends = {
            autocast: [done(run_of(case, 10, seed, autocast))[1][-1] for seed in seeds] for autocast in (False, True)
        }
        parts = [
            f"{fmean(each):.4f} ± {stdev(each):.4f}" if len(each) > 1 else f"{each[0]:.4f}" for each in ends.values()
        ]
        apart = max(abs(a - b) for a, b in zip(*ends.values(), strict=True))
        print(f"| {case} | {' | '.join(parts)} | {apart:.4f} |", flush=True)  # noqa: T201


def main() -> None:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["seconds", "loss"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "seconds":
        seconds(asked.pairs)
    else:
        loss(asked.seeds)


if __name__ == "__main__":
    main()
