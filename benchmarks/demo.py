"""The demo over three seeds, and the same runs on shuffled answers: what is learnt, and what of it is only format.

    python benchmarks/demo.py [--json FILE] [--out FOLDER] [key=value ...]

Each run is a process of its own. A run whose folder is complete is not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from rows import Row, finish

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-fedkseed.toml"
SEEDS = (0, 1, 2)


def ends(out: Path, overrides: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The held-out scores before and after one run."""
    if not (out / "summary.json").exists():
        command = [sys.executable, "-m", "thinwire.cli", "run", str(RECIPE), *overrides, "--out", str(out)]
        command += ["--resume"] if (out / "run.toml").exists() else []
        subprocess.run(command, check=True)
    summary = json.loads((out / "summary.json").read_text())
    return summary["first"][0], summary["final"][0]


def main() -> None:
    """Run what is not there yet, and compare."""
    folder = Path(sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "runs/demo-seeds")
    more = [word for word in sys.argv[1:] if "=" in word]
    gains: dict[str, list[float]] = {}
    rows = []
    for kind, control in (("answers", []), ("shuffled answers", ["data.shuffle_answers=true"])):
        for seed in SEEDS:
            out = folder / f"{'control' if control else 'true'}-{seed}"
            first, final = ends(out, [f"seed={seed}", *control, *more])
            gains.setdefault(kind, []).append(final["accuracy"] - first["accuracy"])
            rows.append(Row(f"seed {seed}, {kind}: accuracy after, before", final["accuracy"], first["accuracy"], ""))
            rows.append(Row(f"seed {seed}, {kind}: loss after, before", final["loss"], first["loss"], ""))
    true, shuffled = mean(gains["answers"]), mean(gains["shuffled answers"])
    rows.append(Row("gain in accuracy, mean: shuffled answers, answers", shuffled, true, ""))
    finish(rows)


if __name__ == "__main__":
    main()
