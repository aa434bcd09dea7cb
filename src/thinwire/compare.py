"""Methods and references on the same model, data and cohorts, one process a run; thinwire.standings has the table.

A comparison is a run file with a table [compare]. Every name of --methods stands for changes of that run: those of
PRESETS, or a method's own name, and then those of [compare.methods.NAME]. First two rounds of each are run apart, for
what they cost either side. Then rates are tuned, one seed each, on rows of the clients that no run trains on and that
are not the held-out ones; then all seeds run with the best rate. Runs are folders below the output, each made by
`thinwire run` in a process of its own; what is there already is not run again. They keep their records, not weights.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from thinwire import apart, config
from thinwire.apart import Cost
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
ALONE = ("local", "centralised")
ABOUT = {
    "base": "the untouched model",
    "local": "each client alone, mean over clients",
    "centralised": "all rows in one place, as many steps as all clients make",
}


Seeds = tuple[NonNegativeInt, ...]
OWN: dict[str, TypeAdapter[Any]] = {  # what a method may have of its own that is not of the run file
    "seeds": TypeAdapter(Annotated[Seeds, Field(min_length=1)]),
    "control_seeds": TypeAdapter(Seeds),
    "grid": TypeAdapter(tuple[PositiveFloat, ...]),
}


class Settings(BaseModel):
    """The table [compare]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2), min_length=1)
    budget: Literal["rounds", "passes", "seconds", "bytes"] = "rounds"
    amount: PositiveFloat | None = None  # of it for each client; no budget but the run file's rounds where it is None
    grid: tuple[PositiveFloat, ...] = (0.3, 1.0, 3.0)  # times each method's lr; none: lr is taken as given
    tuning_rounds: PositiveInt | None = None  # of the runs that tune; as many as the others where it is None
    control_seeds: tuple[NonNegativeInt, ...] | None = Field(None, min_length=1)  # of the control; all where it is None
    validation: float = Field(0.1, gt=0, lt=1)  # the share of the clients' rows that rates are tuned on
    target: PositiveFloat | None = None  # a held-out loss; the table says when it was reached
    costs: bool = True  # whether memory and seconds of either side are measured first, in two rounds of each
    alone: PositiveInt | None = None  # of the clients, evenly spaced, that `local` trains alone; each where it is None
    methods: dict[str, Tree] = {}  # what differs of the run file; `seeds`, `control_seeds` (none: no control), `grid`

    @field_validator("methods")
    @classmethod
    def _own(cls, value: dict[str, Tree]) -> dict[str, Tree]:
        for name, tree in value.items():
            for key in tree.keys() & OWN.keys():
                try:
                    OWN[key].validate_python(tree[key])
                except ValidationError as error:
                    raise ValueError(f"{name}.{key}: {error.errors()[0]['msg']}") from None
        return value


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
    cost: Cost | None = None
    rounds: int | None = None  # that the budget buys; None where that is not known yet
    note: str = ""  # what is to be said of them
    most: int = 0  # rounds, whatever the budget buys: the run file's
    steps_of: int = 1  # clients whose steps a visit makes
    lr: float | None = None
    edge: bool = False
    tuned: dict[float, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the table calls it."""
        return f"{self.name}, shuffled" if self.shuffled else self.name

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
        """A job for each rate of the grid; none for a control, which has the rate of what it controls."""
        if self.shuffled or self.name == "base" or not self.grid or not self.rounds or math.isnan(base := self.rate()):
            return {}
        first, rates = self.seeds[0], [float(f"{base * factor:.3g}") for factor in sorted(self.grid)]
        changes: Tree = {"data": {"validation": self.validation}, "eval": {"every": 0, "generate": 0}}
        if self.tuning_rounds is not None:
            changes["rounds"] = min(self.rounds, self.tuning_rounds)
        if self.clients:
            changes["cohort"] = {"kind": "only", "clients": [self.clients[0]]}
        return {lr: Job(f"{self.name}/tune/lr-{lr:g}", self.run_of(first, lr, **changes)) for lr in rates}

    def priced(self) -> Run:
        """The run that is measured for what it costs: rounds and rate do not matter for that."""
        cohort = {"cohort": {"kind": "only", "clients": [self.clients[0]]}} if self.clients else {}
        return self.run_of(self.seeds[0], None, **cohort, rounds=max(self.most, apart.ROUNDS))

    def final(self) -> dict[tuple[int, int], Job]:
        """A job for each seed, and client where each is alone."""
        where = "control" if self.shuffled else "final"
        if self.name == "base" or not self.rounds:
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
    if settings.amount is not None and settings.budget in ("seconds", "bytes") and not settings.costs:
        raise ConfigError(f"compare.costs: a budget in {settings.budget} is bought at costs that are measured first")
    known = sorted({*PRESETS, *METHODS, *settings.methods})
    if not set(names) - {"base", "local"}:
        raise ConfigError("--methods: needs a method beside the base model and local training, whose runs score it")
    made: list[Plan] = []
    for name in names:
        if name not in known:
            raise ConfigError(f"--methods: {name!r} is not known; known: {', '.join(known)}")
        changes = PRESETS.get(name, {"method": {"name": name}} if name in METHODS else {})
        own = dict(settings.methods.get(name, {}))
        seeds = tuple(own.pop("seeds", settings.seeds))
        control_seeds = tuple(own.pop("control_seeds", settings.control_seeds or seeds))
        grid = tuple(own.pop("grid", settings.grid))
        mine = merge(merge(tree, changes), own)
        plan = Plan(name, mine, seeds, grid, settings.validation, settings.tuning_rounds)
        run = plan.run_of(seeds[0], None)
        plan.most, clients = run.rounds, _clients(run)
        if name == "local":
            some = min(settings.alone or clients, clients)
            plan.clients = tuple(i * clients // some for i in range(some))
        elif name == "centralised":
            each = len(_cohort(config.parse(tree | {"seed": seeds[0]}), clients))
            plan.tree = merge(mine, {"method": {"steps": run.method.model_dump()["steps"] * each}})
            plan.steps_of = each
        afford(plan, settings)
        made.append(plan)
        if control and control_seeds and name != "base":
            twin = copy.deepcopy(plan)
            changes = {"data": {"shuffle_answers": True}, "eval": {"every": 0}}  # its curve is of no interest
            twin.shuffled, twin.tree = True, merge(twin.tree, changes)
            twin.seeds = control_seeds
            made.append(twin)
    _some(made)
    return made


def afford(plan: Plan, settings: Settings) -> None:
    """Set the rounds that the budget buys the plan, where that is known by now; raises ConfigError."""
    run = plan.run_of(plan.seeds[0], None)
    amount, unit, plan.note = settings.amount, settings.budget, ""
    # Alone and in one place nothing need travel: there a budget of bytes says nothing.
    if amount is None or plan.name == "base" or (unit == "bytes" and plan.name in ALONE):
        plan.rounds = run.rounds
    elif unit == "rounds":
        plan.rounds = int(amount)
        plan.note = "" if plan.rounds else f"{amount:g} rounds are none"
    elif unit != "passes" and plan.cost is None:
        plan.rounds = None  # to be measured
    else:
        first = each = _passes(run) / plan.steps_of
        if unit == "passes" and math.isnan(each):
            raise ConfigError(f"compare.budget: the method of {plan.name} does not say how many passes a visit takes")
        if plan.cost is not None and unit == "seconds":
            first = each = plan.cost.client_seconds / plan.steps_of
        elif plan.cost is not None and unit == "bytes":
            first, each = plan.cost.newcomer_bytes, plan.cost.returning_bytes
        bought = 1 + int((amount - first) / each) if amount >= first else 0
        plan.rounds = min(bought, plan.most)
        if bought > plan.most:
            plan.note = f"the budget would buy {bought:,} rounds"
        elif not bought:
            plan.note = f"{amount:g} {unit} buy less than a round, which costs a client {first:g}"
    if plan.rounds:
        plan.tree = merge(plan.tree, {"rounds": plan.rounds})


def price(plan: Plan, out: Path, tell: Callable[[str], None]) -> None:
    """Measure what the plan costs either side, or read what was measured; RuntimeError where its rounds fail."""
    if plan.name == "base" or plan.shuffled:
        return
    run, folder = plan.priced(), out / plan.name / "cost"
    plan.cost = apart.read(folder)
    if plan.cost is None:
        tell(f"measuring {plan.name}: two rounds, with a process for either side")
        cohort = _cohort(run, 1 if run.data.pooled else _clients(run))
        try:
            plan.cost = apart.measure(run, cohort, folder)
        except RuntimeError as error:
            raise RuntimeError(f"{plan.name}, measured apart: {error}") from None


def settle(made: Sequence[Plan], settings: Settings) -> None:
    """Set all rounds anew, now that costs are known; raises ConfigError where the budget buys nobody a round."""
    for plan in made:
        if plan.shuffled:
            plan.cost = next(other.cost for other in made if other.name == plan.name and not other.shuffled)
        afford(plan, settings)
    _some(made)


def _some(made: Sequence[Plan]) -> None:
    trained = [plan for plan in made if plan.name != "base"]
    if all(plan.rounds == 0 for plan in trained):
        raise ConfigError(f"compare.amount: it buys nobody a round: {trained[-1].name}: {trained[-1].note}")


def _passes(run: Run) -> float:
    return run.method.passes() * run.model.view.forward_share


def check_models(made: Sequence[Plan]) -> None:
    """ModelError where a model is not to be had, or has no layers for the factors that some run puts beside them."""
    from thinwire.model.classifier import labels_of, task_of
    from thinwire.model.load import load
    from thinwire.model.resolve import resolve

    for model in dict.fromkeys(plan.run_of(plan.seeds[0], None).model for plan in made):
        folder = resolve(model.path)
        classes = labels_of(folder) or ("one", "other")
        empty, _, _ = load(model.path, empty=True, classes=None if task_of(folder, model.task) == "causal" else classes)
        model.view.trained(empty)


def check_output(made: Sequence[Plan], out: Path) -> None:
    """ConfigError where the output holds a run of another configuration, but for its tuned rate."""
    for plan in made:
        priced = [Job(f"{plan.name}/cost", plan.priced())] if plan.name != "base" and not plan.shuffled else []
        for job in [*priced, *plan.tuning().values(), *plan.final().values()]:
            file = out / job.name / "run.toml"
            if not file.exists():
                continue
            there = config.load(file)
            # how often it was scored on the way makes no other run of it
            there = there.model_copy(update={"eval": there.eval.model_copy(update={"every": job.run.eval.every})})
            if plan.lr is None and "/tune/" not in job.name and plan.grid:
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


def recall(made: Sequence[Plan], settings: Settings, out: Path) -> None:
    """Fill in what other machines have measured and tuned, as far as it is in the output."""
    for plan in made:
        plan.cost = apart.read(out / plan.name / "cost")
    settle(made, settings)
    for plan in made:
        jobs = plan.tuning()
        if jobs and not plan.tuned and all((out / job.name / "summary.json").exists() for job in jobs.values()):
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
        scores = json.loads((out / job.name / "summary.json").read_text())["final"]
        loss = next(row["loss"] for row in scores if row["split"] == "validation")
        plan.tuned[lr] = math.inf if loss is None else float(loss)
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
    for weights in ("state", "model"):  # the records are what a comparison is made of
        shutil.rmtree(folder / weights, ignore_errors=True)


def merge(tree: Tree, changes: Tree) -> Tree:
    """A copy of the tree under the changes; another method or cohort first drops the fields of the old one."""
    found = dict(tree)
    for key, value in changes.items():
        old: Any = found.get(key)
        whole = not isinstance(value, dict) or not isinstance(old, dict) or key == "cohort"
        if whole or (key == "method" and any(value.get(k, old.get(k)) != old.get(k) for k in ("name", "path"))):
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


def _cohort(run: Run, clients: int) -> list[int]:
    """The clients of a first round."""
    from thinwire.keys import Key
    from thinwire.runtime.cohort import cohort_of

    return list(cohort_of(run.cohort, range(clients), 1, Key.root(run.seed)))
