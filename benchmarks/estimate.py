"""What `thinwire estimate` reports against what is measured: SmolLM2-135M, every method, batches of several shapes.

    python benchmarks/estimate.py [--json FILE] [--keep DIR] [NAME ...]

Measured as a comparison measures it: two rounds with one client, a process for the server and one for each visit, two
local steps, float32, one thread. Rows are as long as max_length allows, answers some sixteen tokens. The shapes after
the first two are those that no constant of the estimate was fitted on. --keep leaves what was measured in a folder, and
what is there is not measured again; NAME picks cases by the beginning of their names.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rows import Row, finish

from thinwire import config
from thinwire.compare import measure
from thinwire.config import Run

MODEL = "smollm2-135m-instruct"
SHAPES = {"2x128": (2, 128), "6x128": (6, 128), "8x64 (held out)": (8, 64), "2x256 (held out)": (2, 256)}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": {"name": "fedavg", "lr": 1e-5, "steps": 2}},
    "fedit": {"method": {"name": "fedavg", "lr": 1e-4, "steps": 2}, "model": {"lora": {}}},
    "fedkseed": {"method": {"name": "fedkseed", "lr": 1e-6, "steps": 2, "seeds": 256}},
    "fedzo": {"method": {"name": "fedzo", "lr": 1e-6, "steps": 2, "law": "sign"}},
    "gradualdiff": {"method": {"name": "gradualdiff", "lr": 1e-5, "steps": 2, "dtype": "bfloat16", "start": "shared"}},
    "fedcybgd": {
        "method": {"name": "fedcybgd", "lr": 1e-5, "steps": 2, "dtype": "bfloat16", "start": "shared"}
        | {"drop": 0.45, "prune": 0.1}
    },
    "cgfed": {"method": {"name": "cgfed", "lr": 1e-4, "steps": 2}, "model": {"lora": {}}},
}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "kelp", "maple", "pebble")


def cases(model: str, rows: Path) -> dict[str, Run]:
    """Name -> the run that is measured."""
    found = {}
    for shape, (batch, length) in SHAPES.items():
        for name, changes in METHODS.items():
            tree: dict[str, Any] = {
                "name": name,
                "rounds": 2,
                "threads": 1,
                "model": {"path": model, **changes.get("model", {})},
                "data": {"path": str(rows), "clients": 1, "heldout": 0, "max_length": length, "too_long": "cut"},
                "method": {**changes["method"], "batch_size": batch},
            }
            found[f"{name} {shape}"] = config.parse(tree)
    return found


def write_rows(path: Path, count: int = 48) -> Path:
    """Rows with prompts of some 400 words and answers of eight."""
    lines = []
    for i in range(count):
        words = [WORDS[(i + 5 * j * j + j) % len(WORDS)] for j in range(400)]
        lines.append(json.dumps({"instruction": " ".join(words), "input": "", "output": " ".join(words[:8])}))
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    """Measure, estimate, and print the table of errors."""
    words = sys.argv[1:]
    options = {key: words[words.index(key) + 1] for key in ("--json", "--keep") if key in words}
    names = [word for word in words if word not in options and word not in options.values()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.get("--keep", temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = write_rows(folder / "rows.jsonl")
        found, errors = [], []
        for name, run in cases(MODEL, rows).items():
            if names and not any(name.startswith(wanted) for wanted in names):
                continue
            place = folder / name.replace(" ", "-")
            cost = measure.read(place) or measure.measure(run, [0], place)
            print(name, cost, flush=True)  # noqa: T201
            from thinwire.estimate.costs import estimate

            estimated = estimate(run)
            for side, measured in (("client", cost.client_memory), ("server", cost.server_memory)):
                peak = getattr(estimated, side).total
                found.append(Row(f"{name}: {side}, peak memory", peak / 1e6, measured / 1e6, "MB"))
                errors.append(abs(peak / measured - 1))
    finish(found)
    print(f"median error {median(errors):.1%}, worst {max(errors):.1%}")  # noqa: T201


if __name__ == "__main__":
    main()
