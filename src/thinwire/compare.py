"""Methods and references on the same model, data and cohorts, one process a run, and what came of it.

A comparison is a run file with a table [compare]. Every name of --methods stands for changes of that run: those of
PRESETS, or a method's own name, and then those of [compare.methods.NAME]. Rates are tuned first, one seed each, on rows
of the clients that no run trains on and that are not the held-out ones; then all seeds run with the best rate. Runs are
folders below the output, each made by `thinwire run` in a process of its own; what is there already is not run again.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from thinwire import config
from thinwire.config import ConfigError, Run
from thinwire.methods import METHODS

Tree = dict[str, Any]

PRESETS: dict[str, Tree] = {
    "base": {},
    "local": {"method": {"name": "fedavg"}},
    "centralised": {"method": {"name": "fedavg"}, "data": {"pooled": True}, "cohort": {"kind": "all"}},
    "fedit": {"method": {"name": "fedavg"}, "model": {"lora": {}}},
    "fedkseed-pro": {"method": {"name": "fedkseed", "pro": True}},
}
ABOUT = {
    "base": "the untouched model",
    "local": "each client alone, mean over clients",
    "centralised": "all rows in one place, as many steps as all clients make",
}


class Settings(BaseModel):
    """The table [compare]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2), min_length=1)
    budget: Literal["rounds", "passes"] = "rounds"
    amount: PositiveFloat | None = None  # of the budget; the run file's rounds where it is None
    grid: tuple[PositiveFloat, ...] = (0.3, 1.0, 3.0)  # times each method's lr; none: lr is taken as given
    tuning_rounds: PositiveInt | None = None  # of the runs that tune; as many as the others where it is None
    control_seeds: tuple[NonNegativeInt, ...] | None = Field(None, min_length=1)  # of the control; all where it is None
    validation: float = Field(0.1, gt=0, lt=1)  # the share of the clients' rows that rates are tuned on
    target: PositiveFloat | None = None  # a held-out loss; the table says when it was reached
    methods: dict[str, Tree] = {}


@dataclass(frozen=True)
class Job:
    """One run: its place below the output, and its file."""

    name: str
    run: Run


@dataclass
class Plan:
    """All runs of one name: tuning, then one a seed, for `local` one a seed and client."""

    name: str
    tree: Tree
    seeds: tuple[int, ...]
    grid: tuple[float, ...]
    validation: float = 0.1
    tuning_rounds: int | None = None
    clients: tuple[int, ...] = ()
    shuffled: bool = False
    lr: float | None = None
    edge: bool = False
    tuned: dict[float, float] = field(default_factory=dict)

    def rate(self) -> float:
        """The rate that its file has."""
        lr = self.run_of(self.seeds[0], None).method.model_dump().get("lr")
        return float(lr) if lr is not None else math.nan

    def run_of(self, seed: int, lr: float | None, **changes: Any) -> Run:
        """The run at a seed and rate."""
        tree = copy.deepcopy(self.tree)
        tree = merge(tree, {"seed": seed, "name": self.name} | changes)
        if lr is not None:
            tree = merge(tree, {"method": {"lr": lr}})
        return config.parse(tree, f"compare, {self.name}")

    def tuning(self) -> dict[float, Job]:
        """A job for each rate of the grid."""
        if self.name == "base" or not self.grid or math.isnan(base := self.rate()):
            return {}
        first, rates = self.seeds[0], [float(f"{base * factor:.3g}") for factor in sorted(self.grid)]
        changes: Tree = {"data": {"validation": self.validation}}
        if self.tuning_rounds is not None:
            changes["rounds"] = self.tuning_rounds
        if self.clients:
            changes["cohort"] = {"kind": "only", "clients": [self.clients[0]]}
        return {lr: Job(f"{self.name}/tune/lr-{lr:g}", self.run_of(first, lr, **changes)) for lr in rates}

    def final(self) -> dict[tuple[int, int], Job]:
        """A job for each seed, and client where each is alone."""
        where = "control" if self.shuffled else "final"
        if self.name == "base":
            return {}
        if self.clients:
            return {
                (seed, client): Job(
                    f"{self.name}/{where}/seed-{seed}-client-{client}",
                    self.run_of(seed, self.lr, cohort={"kind": "only", "clients": [client]}),
                )
                for seed in self.seeds
                for client in self.clients
            }
        return {(seed, 0): Job(f"{self.name}/{where}/seed-{seed}", self.run_of(seed, self.lr)) for seed in self.seeds}


def load(path: Path, overrides: Sequence[str]) -> tuple[Tree, Settings]:
    """The tree of the run file without [compare], and that table; raises ConfigError."""
    tree = config.read(path, overrides)
    try:
        settings = Settings.model_validate(tree.pop("compare", {}))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("compare", *first["loc"])))
        raise ConfigError(f"{path}: {place}: {first['msg']}, got {first['input']!r:.60}") from None
    return tree, settings


def plans(tree: Tree, settings: Settings, names: Sequence[str], control: bool) -> list[Plan]:
    """What is to be run under each name, checked as far as it can be before anything runs; raises ConfigError."""
    known = sorted({*PRESETS, *METHODS, *settings.methods})
    if not set(names) - {"base", "local"}:
        raise ConfigError("--methods: needs a method beside the base model and local training, whose runs score it")
    made: list[Plan] = []
    for name in names:
        if name not in known:
            raise ConfigError(f"--methods: {name!r} is not known; known: {', '.join(known)}")
        changes = PRESETS.get(name, {"method": {"name": name}} if name in METHODS else {})
        mine = merge(merge(tree, changes), settings.methods.get(name, {}))
        plan = Plan(name, mine, settings.seeds, settings.grid, settings.validation, settings.tuning_rounds)
        run = plan.run_of(settings.seeds[0], None)
        clients = _clients(run)
        if name == "local":
            plan.clients = tuple(range(clients))
        elif name == "centralised":
            each = _cohort_size(config.parse(tree | {"seed": settings.seeds[0]}), clients)
            plan.tree = merge(mine, {"method": {"steps": run.method.model_dump()["steps"] * each}})
        if settings.amount is not None and name != "base":
            cost = run.method.passes() * (1 if run.model.lora is None else 2 / 3)
            if settings.budget == "passes" and math.isnan(cost):
                raise ConfigError(f"compare.budget: the method of {name} does not say how many passes a visit takes")
            rounds = settings.amount / (cost if settings.budget == "passes" else 1)
            if rounds < 1:
                raise ConfigError(
                    f"compare.amount: {settings.amount:g} {settings.budget} buy {name} less than a round of "
                    f"{cost:g} passes a client"
                )
            plan.tree = merge(plan.tree, {"rounds": int(rounds)})
        made.append(plan)
        if control and name != "base":
            twin = copy.deepcopy(plan)
            twin.shuffled, twin.tree = True, merge(twin.tree, {"data": {"shuffle_answers": True}})
            twin.seeds = settings.control_seeds or settings.seeds
            made.append(twin)
    return made


def check_output(made: Sequence[Plan], out: Path) -> None:
    """ConfigError where the output holds a run of another configuration, but for its tuned rate."""
    for plan in made:
        for job in [*plan.tuning().values(), *plan.final().values()]:
            file = out / job.name / "run.toml"
            if not file.exists():
                continue
            there = config.load(file)
            if plan.lr is None and "tune/" not in job.name and plan.grid:
                same = there.method.model_copy(update={"lr": job.run.method.model_dump().get("lr")})
                there = there.model_copy(update={"method": same})
            if (difference := job.run.first_difference(there)) is not None:
                raise ConfigError(f"{out / job.name}: holds another run: {difference}")


def share(made: Sequence[Plan], part: str) -> list[Plan]:
    """What machine I of N runs, I/N in `part`: whole names, a control with its name; raises ConfigError."""
    try:
        i, n = map(int, part.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise ConfigError(f"--part: {part!r} is not I/N with I from 1 to N")
    names = list(dict.fromkeys(plan.name for plan in made))
    return [plan for plan in made if names.index(plan.name) % n == i - 1]


def recall(made: Sequence[Plan], out: Path) -> None:
    """Fill in what other machines have tuned, as far as their runs are in the output."""
    for plan in made:
        if not plan.shuffled and not plan.tuned:
            jobs = plan.tuning()
            if jobs and all((out / job.name / "summary.json").exists() for job in jobs.values()):
                tune(plan, out, lambda text: None)
    for plan in made:
        if plan.shuffled:
            plan.lr = next(other.lr for other in made if other.name == plan.name and not other.shuffled)


def execute(plan: Plan, others: Sequence[Plan], out: Path, tell: Callable[[str], None]) -> None:
    """Tune, then run all seeds; raises RuntimeError with the run's last line where one fails."""
    if plan.shuffled:  # a control has the rate of what it controls
        twin = next(other for other in others if other.name == plan.name and not other.shuffled)
        plan.lr = twin.lr
    else:
        tune(plan, out, tell)
    for job in plan.final().values():
        run(job, out, tell)


def tune(plan: Plan, out: Path, tell: Callable[[str], None]) -> None:
    """Find the best rate on the validation rows."""
    for lr, job in plan.tuning().items():
        run(job, out, tell)
        loss = _score(_summary(out / job.name)["final"], "validation", "loss")
        plan.tuned[lr] = loss if math.isfinite(loss) else math.inf
    if plan.tuned:
        plan.lr = min(plan.tuned, key=lambda lr: plan.tuned[lr])
        plan.edge = plan.lr in (min(plan.tuned), max(plan.tuned)) and len(plan.tuned) > 1
        marks = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in plan.tuned.items())
        at = " (at the edge of the grid)" if plan.edge else ""
        tell(f"{plan.name}: validation loss by lr {marks}; taken {plan.lr:g}{at}")


def run(job: Job, out: Path, tell: Callable[[str], None]) -> None:
    """The job in a process of its own, or what is left of it."""
    folder = out / job.name
    if (folder / "summary.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, log = folder.with_name(f"{folder.name}.toml"), folder.with_name(f"{folder.name}.log")
    file.write_text(job.run.to_toml(), encoding="utf-8")
    tell(f"running {job.name}")
    command = [sys.executable, "-m", "thinwire.cli", "run", str(file), "--out", str(folder)]
    if (folder / "run.toml").exists():
        command.append("--resume")
    with log.open("w") as text:
        status = subprocess.run(command, stdout=text, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        last = (log.read_text().strip().splitlines() or [f"exit status {status}"])[-1]
        raise RuntimeError(f"{job.name}: {last.removeprefix('thinwire: ')}")


@dataclass(frozen=True)
class Line:
    """One name's line of the table; means over seeds, spreads as standard deviations, None where not known."""

    name: str
    seeds: int
    lr: float | None
    edge: bool
    trained: bool | None
    steps: float
    passes: float
    bytes_down: float
    bytes_up: float
    bytes_round: float
    peak_memory_bytes: float
    client_seconds: float
    server_seconds: float
    target_round: float | None
    target_bytes: float | None
    scores: Mapping[str, tuple[float, float | None]]


def line(plan: Plan, made: Sequence[Plan], out: Path, target: float | None) -> Line | None:
    """The line of what has been run; None where something is missing. The base model's scores are any run's first."""
    untouched = plan.name == "base"
    runs = next((other for other in made if other.name not in ("base", "local")), plan) if untouched else plan
    done = {}
    for (seed, client), job in runs.final().items():
        if not (out / job.name / "summary.json").exists():
            return None
        done[seed, client] = _record(out / job.name, job.run, target)
    if not done:
        return None
    seeds = {seed: [record for (s, _), record in done.items() if s == seed] for seed, _ in done}
    first = "first" if untouched else "final"
    scores: dict[str, tuple[float, float | None]] = {}
    for key in dict.fromkeys(key for record in done.values() for key in record[first]):
        # a run whose loss has left all numbers has none in its records: then neither has the mean
        values = [mean(record[first].get(key, math.nan) for record in records) for records in seeds.values()]
        scores[key] = (mean(values), stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None)
    ends = {seed: [[r[end].get("heldout loss", math.nan) for end in ("first", "final")] for r in records]
            for seed, records in seeds.items()}  # fmt: skip
    gains = [mean(before - after for before, after in pairs) for pairs in ends.values()]
    trained = None
    if len(gains) > 1 and all(map(math.isfinite, gains)):
        trained = abs(mean(gains)) > 2 * stdev(gains) / math.sqrt(len(gains))

    def average(key: str) -> float:
        return 0.0 if untouched else mean(record[key] for record in done.values())

    reached = [record["target"] for record in done.values()]
    all_reached = bool(reached) and all(at is not None for at in reached) and not untouched
    name = f"{plan.name}, shuffled" if plan.shuffled else plan.name
    return Line(
        name=name,
        seeds=len(seeds),
        lr=None if untouched else (plan.lr or plan.rate()),
        edge=plan.edge,
        trained=None if untouched else trained,
        **{key: average(key) for key in RECORDED},
        target_round=mean(at[0] for at in reached) if all_reached else None,
        target_bytes=mean(at[1] for at in reached) if all_reached else None,
        scores=scores,
    )


RECORDED = (
    "steps",
    "passes",
    "bytes_down",
    "bytes_up",
    "bytes_round",
    "peak_memory_bytes",
    "client_seconds",
    "server_seconds",
)


def _record(folder: Path, run: Run, target: float | None) -> dict[str, Any]:
    from thinwire.runtime.loop import read_records

    summary, rounds = _summary(folder), read_records(folder / "rounds.jsonl")
    visits = [visit for record in rounds for visit in record["clients"] if "error" not in visit]
    client_seconds = sum(visit["seconds"] for visit in visits)
    total = summary["bytes_down"] + summary["bytes_up"]
    sent, reached = 0, None
    after = {record["round"]: (sent := sent + record["bytes_down"] + record["bytes_up"]) for record in rounds}
    for score in read_records(folder / "evals.jsonl"):
        loss = score["loss"] if score["split"] == "heldout" and score["loss"] is not None else math.nan
        if target is not None and reached is None and loss <= target:
            reached = (score["round"], after.get(score["round"], 0))
    return {
        "first": _scores(summary["first"]),
        "final": _scores(summary["final"]),
        "steps": len(visits) * run.method.model_dump().get("steps", math.nan),
        "passes": len(visits) * run.method.passes(),
        "bytes_down": summary["bytes_down"],
        "bytes_up": summary["bytes_up"],
        "bytes_round": total / max(1, len(visits)),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "client_seconds": client_seconds,
        "server_seconds": sum(record["seconds"] for record in rounds) - client_seconds,
        "target": reached,
    }


def _scores(evals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    fields = ("loss", "accuracy", "rouge_l")
    return {f"{row['split']} {name}": row[name] for row in evals for name in fields if row[name] is not None}


def _score(evals: Sequence[Mapping[str, Any]], split: str, name: str) -> float:
    return next((float(row[name]) for row in evals if row["split"] == split and row[name] is not None), math.nan)


def _summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def write(lines: Sequence[Line], made: Sequence[Plan], out: Path) -> None:
    """table.json and table.csv in the output; the grids are in the former."""
    grids = {plan.name: {f"{lr:g}": loss for lr, loss in plan.tuned.items()} for plan in made if plan.tuned}
    (out / "table.json").write_text(json.dumps({"lines": [asdict(x) for x in lines], "grids": grids}, indent=2) + "\n")
    keys = list(dict.fromkeys(key for x in lines for key in x.scores))
    with (out / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        plain = [name for name in Line.__dataclass_fields__ if name != "scores"]
        rows.writerow([*plain, *(part for key in keys for part in (key, f"{key} sd"))])
        for x in lines:
            scores = [part for key in keys for part in x.scores.get(key, (None, None))]
            rows.writerow([*(getattr(x, name) for name in plain), *scores])


def merge(tree: Tree, changes: Tree) -> Tree:
    """A copy of the tree under the changes; another method or cohort first drops the fields of the old one."""
    found = dict(tree)
    for key, value in changes.items():
        old = found.get(key)
        whole = not isinstance(value, dict) or not isinstance(old, dict) or key == "cohort"
        if whole or (key == "method" and value.get("name", old.get("name")) != old.get("name")):
            found[key] = copy.deepcopy(value)
        else:
            found[key] = merge(old, value)
    return found


def _clients(run: Run) -> int:
    """How many clients the run has; its data is read for it where the file alone does not say."""
    if run.data.partition in ("iid", "dirichlet"):
        return run.data.clients
    from thinwire import build
    from thinwire.keys import Key

    plain = run.data.model_copy(update={"pooled": False})
    return len(build.rows_of(plain, Key.root(run.seed)).clients)


def _cohort_size(run: Run, clients: int) -> int:
    """The clients of a first round."""
    from thinwire.keys import Key
    from thinwire.runtime.cohort import cohort_of

    return len(cohort_of(run.cohort, range(clients), 1, Key.root(run.seed)))
