"""The table of a comparison: what its runs cost, and what came of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from thinwire.compare.plan import ALONE, Plan
from thinwire.config import Run
from thinwire.records import MEASURED, dumps, read_records

TRAVEL = {"bytes_down", "bytes_up", "bytes_visit", "server_memory", "server_seconds", "round_seconds"}


@dataclass(frozen=True)
class Line:
    """One name's line; means over seeds, spreads as standard deviations, None where not known or not to be had.

    Memory in bytes, and the seconds of a visit and of the server in a round with two clients, were measured apart;
    client_seconds and server_seconds are those of the runs, in all. `curve` has (round, bytes so far, held-out loss).
    """

    name: str
    note: str = ""
    seeds: int = 0
    lr: float | None = None
    edge: bool = False
    trained: bool | None = None
    rounds: int | None = None
    steps: float | None = None
    passes: float | None = None
    bytes_down: float | None = None
    bytes_up: float | None = None
    bytes_visit: float | None = None
    client_memory: int | None = None
    server_memory: int | None = None
    visit_seconds: float | None = None
    round_seconds: float | None = None
    client_seconds: float | None = None
    server_seconds: float | None = None
    target_round: float | None = None
    target_bytes: float | None = None
    scores: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    curve: Sequence[tuple[int, float, float]] = ()


@dataclass(frozen=True)
class Record:
    """What is taken from one run."""

    first: Mapping[str, float]
    final: Mapping[str, float]
    totals: Mapping[str, float]
    curve: Sequence[tuple[int, float, float]]  # round, bytes so far, held-out loss


def line(plan: Plan, made: Sequence[Plan], out: Path, target: float | None) -> Line | None:
    """The line of what has been run; None where something is missing. The base model's scores are any run's first."""
    if plan.name == "base":
        others = (records(other, out) for other in made if other.name != "local" and not other.shuffled)
        found = max(others, key=len, default={})
        return Line(plan.title, seeds=len(found), scores=_scores(found, "first")) if found else None
    if plan.rounds == 0:
        return Line(plan.title, plan.note)
    found = records(plan, out)
    if not found:
        return None
    runs = [record for seed in found.values() for record in seed]
    gains = [fmean(_loss(r.first) - _loss(r.final) for r in seed) for seed in found.values()]
    known = len(gains) > 1 and all(map(math.isfinite, gains))
    reached = [_reached(record.curve, target) for record in runs]
    rounds, sent = zip(*(at for at in reached if at is not None), strict=True) if all(reached) else ((), ())
    costs: dict[str, Any] = {key: fmean(record.totals[key] for record in runs) for key in runs[0].totals}
    if (cost := plan.cost) is not None:
        costs |= {"client_memory": cost.client_memory, "server_memory": cost.server_memory}
        costs |= {"visit_seconds": cost.client_seconds, "round_seconds": cost.server_seconds}
    if plan.name in ALONE:  # no server, and nothing travels
        costs |= dict.fromkeys((*costs.keys() & TRAVEL,))
    return Line(
        name=plan.title,
        note=plan.note,
        seeds=len(found),
        lr=plan.lr if plan.lr is not None else plan.rate(),
        edge=plan.edge,
        trained=abs(fmean(gains)) > 2 * stdev(gains) / math.sqrt(len(gains)) if known else None,
        rounds=plan.rounds,
        target_round=fmean(rounds) if rounds else None,
        target_bytes=fmean(sent) if sent and plan.name not in ALONE else None,
        scores=_scores(found, "final"),
        curve=[_mean(points) for points in zip(*(record.curve for record in runs), strict=False)],
        **costs,
    )


def records(plan: Plan, out: Path) -> dict[int, list[Record]]:
    """Seed -> the records of its runs (one; for `local` one a client); nothing unless all have been run."""
    found: dict[int, list[Record]] = {}
    for (seed, _), job in plan.final().items():
        if not (out / job.name / "summary.json").exists():
            return {}
        found.setdefault(seed, []).append(_record(out / job.name, job.run))
    return found


def _record(folder: Path, run: Run) -> Record:
    summary, rounds = json.loads((folder / "summary.json").read_text()), read_records(folder / "rounds.jsonl")
    made = [(record["round"], visit) for record in rounds for visit in record["clients"] if "error" not in visit]
    visits, work = [visit for _, visit in made], [run.method.work(round) for round, _ in made]
    sent, after = 0, {0: 0}
    for record in rounds:
        after[record["round"]] = sent = sent + record["bytes_down"] + record["bytes_up"]
    seconds = sum(visit["seconds"] for visit in visits)
    totals = {
        "steps": sum(each.steps for each in work),
        "passes": sum(each.rows for each in work),
        "bytes_down": summary["bytes_down"],
        "bytes_up": summary["bytes_up"],
        "bytes_visit": (summary["bytes_down"] + summary["bytes_up"]) / max(1, len(visits)),
        "client_seconds": seconds,
        "server_seconds": sum(record["seconds"] for record in rounds) - seconds,
    }
    # a run whose loss has left all numbers has none in its records
    losses = [
        row | {"loss": math.nan if row["loss"] is None else row["loss"]} for row in read_records(folder / "evals.jsonl")
    ]
    curve = [(row["round"], after.get(row["round"], sent), row["loss"]) for row in losses if row["split"] == "heldout"]
    return Record(_flat(summary["first"]), _flat(summary["final"]), totals, curve)


def _flat(evals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {f"{row['split']} {score}": row[score] for row in evals for score in MEASURED if row.get(score) is not None}


def _loss(scores: Mapping[str, float]) -> float:
    return scores.get("heldout loss", math.nan)


def _scores(found: Mapping[int, Sequence[Record]], end: str) -> dict[str, tuple[float, float | None]]:
    """Score -> mean and spread over seeds; a mean of NaN where one run has lost it."""
    ends = [[getattr(record, end) for record in seed] for seed in found.values()]
    table: dict[str, tuple[float, float | None]] = {}
    for key in dict.fromkeys(key for seed in ends for scores in seed for key in scores):
        values = [fmean(scores.get(key, math.nan) for scores in seed) for seed in ends]
        table[key] = (fmean(values), stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None)
    return table


def _mean(points: Sequence[tuple[int, float, float]]) -> tuple[int, float, float]:
    return points[0][0], fmean(sent for _, sent, _ in points), fmean(loss for _, _, loss in points)


def _reached(curve: Sequence[tuple[int, float, float]], target: float | None) -> tuple[int, float] | None:
    """The round and the bytes at which the loss first was the target or less."""
    return next(((round, sent) for round, sent, loss in curve if target is not None and loss <= target), None)


def write(lines: Sequence[Line], made: Sequence[Plan], out: Path) -> None:
    """table.json and table.csv in the output; the grids are in the former. What is no number is null there."""
    grids = {plan.name: {f"{lr:g}": loss for lr, loss in plan.tuned.items()} for plan in made if plan.tuned}
    whole = {"lines": [asdict(line) for line in lines], "grids": grids}
    (out / "table.json").write_text(dumps(whole, indent=2) + "\n")
    keys = list(dict.fromkeys(key for x in lines for key in x.scores))
    with (out / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        plain = [name for name in Line.__dataclass_fields__ if name not in ("scores", "curve")]
        rows.writerow([*plain, *(part for key in keys for part in (key, f"{key} sd"))])
        for x in lines:
            scores = [part for key in keys for part in x.scores.get(key, (None, None))]
            rows.writerow([*(getattr(x, name) for name in plain), *scores])
