"""What privacy costs: final loss and accuracy without it and at epsilon 8, 4 and 1, a line of JSON a run.

    python benchmarks/private.py --out FILE.jsonl [--levels ...] [--methods ...] [--epsilons none 8 4 1]
                                 [--seeds 0 1 2] [--rounds N] [--set method.lr=...]
    python benchmarks/private.py --out FILE.jsonl --table

The film desk on MiniLM with a fresh head, 400 rows held out. Of records: two clients with 3,400 rows each, 20 steps of
some 256 rows, delta 1e-4, noise added by each client. Of clients: a hundred with 68 rows each, ten rounds of a step of
8 rows, delta 1e-3, noise added by the server, all in each round. Runs that the file has are not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cells import read

from thinwire import assemble, config
from thinwire.data.bundled import film_desk
from thinwire.keys import Key
from thinwire.records import Record, append
from thinwire.runtime.course import Watch, train

ROWS, HELDOUT = 6800, 400
LAYERS = ["query", "key", "value", "dense"]
LEVELS: dict[str, dict[str, Any]] = {
    "record": {"clients": 2, "delta": 1e-4, "batch_size": 256},
    "client": {"clients": 100, "delta": 1e-3, "batch_size": 8},
}
ROUNDS = {"record": 2, "client": 10}  # by default
VIEWS: dict[str, dict[str, Any]] = {
    "fedit": {"kind": "lora", "rank": 1, "alpha": 2.0, "targets": ["query", "value"]},
    "onebit": {"kind": "tied", "numbers": 1024, "targets": LAYERS},
    "fedkseed": {"kind": "filter", "parts": ["*classifier*", "*pooler*"]},
}
METHODS: dict[tuple[str, str], dict[str, Any]] = {
    ("record", "fedit"): {"name": "fedavg", "lr": 8e-3, "steps": 10},
    ("record", "onebit"): {"name": "onebit", "lr": 3e-3, "schedule": "constant", "steps": 2},
    ("record", "fedkseed"): {"name": "fedkseed", "seeds": 256, "eps": 1e-2, "lr": 2e-2, "shared": True, "steps": 10},
    ("client", "fedit"): {"name": "fedavg", "optimiser": "sgd", "lr": 1.0, "steps": 1},
    ("client", "onebit"): {"name": "onebit", "lr": 3e-3, "schedule": "constant", "steps": 1},
    ("client", "fedkseed"): {"name": "fedkseed", "seeds": 256, "eps": 1e-2, "lr": 2e-2, "shared": True, "steps": 1},
}
MORE_ROUNDS = {("record", "onebit"): 10}  # one bit a number carries little of ten steps
CLIP = 1.0
WHAT = ("level", "method", "epsilon", "seed")


def files_of(folder: Path) -> dict[str, str]:
    """The clients' and the held-out rows as files: no row is in both."""
    rows, found, start = film_desk(), {}, 0
    order = Key.root(7).permutation(len(rows))
    for name, count in (("path", ROWS), ("heldout", HELDOUT)):
        found[name] = str(folder / f"{name}.jsonl")
        chosen = [rows[i].fields for i in order[start : start + count]]
        Path(found[name]).write_text("".join(json.dumps(dict(fields)) + "\n" for fields in chosen))
        start += count
    return found


def measured(cell: Mapping[str, Any], rounds: int, changes: list[str]) -> Record:
    """The line of a cell."""
    began, level = time.perf_counter(), LEVELS[cell["level"]]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tree: dict[str, Any] = {
            "seed": cell["seed"],
            "rounds": rounds,
            "model": {"path": "minilm", "view": dict(VIEWS[cell["method"]])},
            "data": {**files_of(place), "clients": level["clients"], "partition": "iid", "max_length": 32},
            "method": {**METHODS[cell["level"], cell["method"]], "batch_size": level["batch_size"]},
            "eval": {"rows": HELDOUT, "batch_size": 64},
        }
        if cell["epsilon"] is not None:
            tree["privacy"] = {
                "level": cell["level"],
                "epsilon": cell["epsilon"],
                "delta": level["delta"],
                "clip": CLIP,
            }
        config.override(tree, [change for change in changes if cell["epsilon"] or not change.startswith("privacy.")])
        start = assemble.begin(*assemble.prepared(config.parse(tree, "the benchmark")))
        summary = train(start.job(place / "run", Watch()))
    first, last = (next(row for row in summary[when] if row["split"] == "heldout") for when in ("first", "final"))
    return {
        **cell,
        "rounds": rounds,
        "set": changes,
        "start": first["loss"],
        "loss": last["loss"],
        "accuracy": last["accuracy"],
        "spent": summary.get("privacy", {}).get("epsilon"),
        "noise": summary.get("privacy", {}).get("noise"),
        "seconds": time.perf_counter() - began,
    }


def table(records: Iterable[Record]) -> Iterator[str]:
    """Markdown: a row a level and method, a column an epsilon: mean accuracy, its spread, and the share of the gain."""
    cells: dict[tuple[str, str, Any], list[Record]] = {}
    for row in records:
        cells.setdefault((row["level"], row["method"], row["epsilon"]), []).append(row)
    heads = sorted({key[2] for key in cells}, key=lambda head: -(head or 1e9))
    yield (
        "| unit | method | "
        + " | ".join("no privacy" if head is None else f"epsilon {head:g}" for head in heads)
        + " |"
    )
    yield "| --- | --- |" + " --- |" * len(heads)
    for level, method in dict.fromkeys(key[:2] for key in cells):
        free = cells.get((level, method, None), [])
        gain = fmean(row["start"] - row["loss"] for row in free) if free else 0.0
        parts = []
        for head in heads:
            found = cells.get((level, method, head), [])
            if not found:
                parts.append("-")
                continue
            kept = fmean(row["start"] - row["loss"] for row in found) / gain if gain else 0.0
            scores = [row["accuracy"] for row in found]
            spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
            parts.append(f"{fmean(scores):.3f}{spread} ({kept:.0%})")
        yield f"| {level} | {method} | " + " | ".join(parts) + " |"


def main() -> None:
    """Do what is missing, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--methods", nargs="+", choices=list(VIEWS), default=list(VIEWS))
    parser.add_argument("--epsilons", nargs="+", default=["none", "8", "4", "1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[])
    asked = parser.parse_args()
    done = read(asked.out)
    if asked.table:
        print("\n".join(table(done)))  # noqa: T201
        return
    known = {(*(row[key] for key in WHAT), row["rounds"], tuple(row["set"])) for row in done}
    epsilons = [None if text == "none" else float(text) for text in asked.epsilons]
    for values in product(asked.seeds, asked.levels, asked.methods, epsilons):
        seed, level, method, most = values
        cell = {"level": level, "method": method, "epsilon": most, "seed": seed}
        rounds = asked.rounds or MORE_ROUNDS.get((level, method), ROUNDS[level])
        if (*cell.values(), rounds, tuple(asked.set)) not in known:
            record = measured(cell, rounds, asked.set)
            append(asked.out, record)
            print(json.dumps(record), file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
