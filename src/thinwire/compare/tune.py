"""The runs of a comparison: rates are tuned, then all seeds run, each in a process of its own."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from thinwire.compare import measure
from thinwire.compare.budget import settle
from thinwire.compare.plan import Job, Plan, Settings


def recall(made: Sequence[Plan], settings: Settings, out: Path) -> None:
    """Fill in what other machines have measured and tuned, as far as it is in the output."""
    for plan in made:
        plan.cost = measure.read(out / plan.name / "cost")
    settle(made, settings)
    for plan in made:
        jobs = plan.tuning()
        if jobs and not plan.tuned and all((out / job.name / "summary.json").exists() for job in jobs.values()):
            tune(plan, out, lambda text: None)
    for plan in made:
        if plan.shuffled:
            plan.lr = next(other.lr for other in made if other.name == plan.name and not other.shuffled)


def execute(plan: Plan, others: Sequence[Plan], out: Path, report: Callable[[str], None]) -> None:
    """Tune, then run all seeds; raises RuntimeError with the run's last line where one fails."""
    if plan.shuffled:  # a control has the rate of what it controls
        twin = next(other for other in others if other.name == plan.name and not other.shuffled)
        plan.lr = twin.lr
    else:
        tune(plan, out, report)
    for job in plan.final().values():
        run(job, out, report)


def tune(plan: Plan, out: Path, report: Callable[[str], None]) -> None:
    """Find the best rate on the validation rows."""
    for lr, job in plan.tuning().items():
        run(job, out, report)
        scores = json.loads((out / job.name / "summary.json").read_text())["final"]
        loss = next(row["loss"] for row in scores if row["split"] == "validation")
        plan.tuned[lr] = math.inf if loss is None else float(loss)
    if plan.tuned:
        plan.lr = min(plan.tuned, key=lambda lr: plan.tuned[lr])
        plan.edge = plan.lr in (min(plan.tuned), max(plan.tuned)) and len(plan.tuned) > 1
        marks = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in plan.tuned.items())
        at = " (at the edge of the grid)" if plan.edge else ""
        report(f"{plan.name}: validation loss by lr {marks}; taken {plan.lr:g}{at}")


def run(job: Job, out: Path, report: Callable[[str], None]) -> None:
    """The job in a process of its own, or what is left of it."""
    folder = out / job.name
    if (folder / "summary.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, log = folder.with_name(f"{folder.name}.toml"), folder.with_name(f"{folder.name}.log")
    file.write_text(job.run.to_toml(), encoding="utf-8")
    report(f"running {job.name}")
    command = [sys.executable, "-m", "thinwire.cli", "run", str(file), "--out", str(folder)]
    if (folder / "run.toml").exists():
        command.append("--resume")
    with log.open("w") as text:
        status = subprocess.run(command, stdout=text, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        last = (log.read_text().strip().splitlines() or [f"exit status {status}"])[-1]
        raise RuntimeError(f"{job.name}: {last.removeprefix('thinwire: ')}")
    for weights in ("state", "model"):  # the records are what a comparison is made of
        shutil.rmtree(folder / weights, ignore_errors=True)
