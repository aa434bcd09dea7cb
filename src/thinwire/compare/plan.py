"""Methods and references on the same model, data and cohorts, one process a run; compare.table has what came of them.

A comparison is a run file with a table [compare]. Every name of --methods stands for changes of that run: those of
PRESETS, or a method's own name, and then those of [compare.methods.NAME]. First two rounds of each are run apart, for
what they cost either side. Then rates are tuned, one seed each, on rows of the clients that no run trains on and that
are not the held-out ones; then all seeds run with the best rate. Runs are folders below the output, each made by
`thinwire run` in a process of its own; what is there already is not run again. They keep their records, not weights.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
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

from thinwire import config
from thinwire.compare.measure import ROUNDS, Cost
from thinwire.config import Run

Tree = dict[str, Any]

PRESETS: dict[str, Tree] = {
    "base": {},
    "local": {"method": {"name": "fedavg"}},
    "centralised": {"method": {"name": "fedavg"}, "data": {"pooled": True}, "cohort": {"kind": "all"}},
    "fedit": {"method": {"name": "fedavg"}, "model": {"lora": {}}},
    "fedprox": {"method": {"name": "fedavg", "proximal": 0.01}},
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
    target: PositiveFloat | None = None  # a held-out loss; the table has when it was reached
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
    note: str = ""  # a remark on them, for people
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
        plain = {"every": 0, "generate": 0, "patience": 0, "keep": "last", "on": None, "target": None, "warmup": None}
        changes: Tree = {"data": {"validation": self.validation, "selection": None}, "eval": plain}
        if self.tuning_rounds is not None:
            changes["rounds"] = min(self.rounds, self.tuning_rounds)
        if self.clients:
            changes["cohort"] = {"kind": "only", "clients": [self.clients[0]]}
        return {lr: Job(f"{self.name}/tune/lr-{lr:g}", self.run_of(first, lr, **changes)) for lr in rates}

    def priced(self) -> Run:
        """The run that is measured for what it costs: rounds and rate do not matter for that."""
        cohort = {"cohort": {"kind": "only", "clients": [self.clients[0]]}} if self.clients else {}
        return self.run_of(self.seeds[0], None, **cohort, rounds=max(self.most, ROUNDS))

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


def clients_of(run: Run) -> int:
    """How many clients the run has; its data is read for it where the file alone does not have it."""
    if run.data.partition in ("iid", "dirichlet"):
        return run.data.clients
    from thinwire import assemble
    from thinwire.keys import Key

    plain = run.data.model_copy(update={"pooled": False})
    return len(assemble.rows_of(plain, Key.root(run.seed)).clients)


def first_cohort(run: Run, clients: int) -> list[int]:
    """The clients of a first round."""
    from thinwire.keys import Key
    from thinwire.runtime.seats import Seats

    return list(Seats(Key.root(run.seed), run.rounds).cohort(run.cohort, clients, 1))
