"""Agreements and choices of a round that a run cannot keep to: a line before anything runs."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from thinwire import config
from thinwire.assemble.agreement import check_agreement
from thinwire.assemble.choice import check_choice, choice_of, stop_of
from thinwire.config import ConfigError

NAMES = ["north", "south", "east"]
BASE = 'rounds = 4\n[data]\npath = "x"\n[method]\nname = "fedavg"\n[federation]\n[eval]\n'


def run_of(*overrides: str) -> config.Run:
    tree = tomllib.loads(BASE)
    config.override(tree, overrides)
    return config.parse(tree, "run.toml")


TABLE = "federation.weights.by=table"
LATE = "federation.late: a reply of {}, as it is set, means nothing after its round"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([], None),
        ([TABLE, "federation.weights.table={north=0.2, south=0.3, east=0.5}"], None),
        (
            [TABLE, "federation.weights.table={north=0.2, soth=0.3, east=0.5}"],
            "federation.weights.table: no client is called 'soth' (did you mean south?)",
        ),
        ([TABLE, "federation.weights.table={north=0.2, south=0.8}"], "federation.weights.table: no share for 'east'"),
        (["federation.weights.cap=0.34"], None),
        (
            ["federation.weights.cap=0.3"],
            "federation.weights.cap: 0.3 cannot hold in a round of 3 clients; there it is 0.3333 at least",
        ),
        (
            ["federation.weights.cap=0.4", 'cohort=[{kind="all", rounds=2}, {kind="uniform", n=2}]'],
            "federation.weights.cap: 0.4 cannot hold in a round of 2 clients; there it is 0.5 at least",
        ),
        (
            ["federation.weights.cap=0.9", "cohort.kind=cyclic"],
            "federation.weights.cap: 0.9 cannot hold in a round of one client; there it is 1 at least",
        ),
        (
            ["federation.weights.floor=0.4"],
            "federation.weights.floor: 0.4 cannot hold in a round of 3 clients; there it is 0.3333 at most",
        ),
        (["federation.weights.floor=0.4", 'cohort={kind="only", clients=[0, 2]}'], None),
        (
            ["federation.weights.cap=0.5", "method.name=feedsign"],
            "federation.weights: feedsign takes no mean of its clients' replies: each counts as it has it",
        ),
        (["federation.late=1", "method.name=fedkseed"], None),
        (["federation.late=1", "method.name=onebit"], None),
        (["federation.late=1", "method.name=gradualdiff", "method.aggregation=median"], None),
        (
            ["federation.late=1", "method.name=fedkseed", "privacy.level=client", "privacy.epsilon=2"],
            "federation.late: what a private run may spend is counted by who is drawn for a round",
        ),
        (["federation.late=1"], LATE.format("fedavg")),
        (["federation.late=1", "method.name=feedsign"], LATE.format("feedsign")),
        (["federation.late=1", "method.name=onebit", "method.merge_every=2"], LATE.format("onebit")),
    ],
)
def test_an_agreement_that_cannot_be_kept_is_refused(changes: list[str], line: str | None) -> None:
    run = run_of(*changes)
    if line is None:
        check_agreement(run, NAMES)
        return
    with pytest.raises(ConfigError) as caught:
        check_agreement(run, NAMES)
    assert str(caught.value) == line


BEST = "eval.keep=best"


@pytest.mark.parametrize(
    ("changes", "splits", "line"),
    [
        ([], [], None),
        ([BEST], ["heldout"], None),
        ([BEST], [], "eval.patience, eval.target, eval.keep: no rows are held out to show which round is better"),
        ([BEST, "federation.evaluate=true"], [], None),
        ([BEST, "federation.evaluate=true", "eval.on=sites"], ["heldout"], None),
        ([BEST, "eval.on=sites"], ["heldout"], "eval.on: no rows are called 'sites'; there are heldout"),
        ([BEST, "eval.on=held"], ["heldout"], "eval.on: no rows are called 'held'; there are heldout"),
        ([BEST, "data.selection=0.1"], ["heldout", "selection"], None),
        (
            [BEST, "data.selection=0.1"],
            ["heldout"],
            "data.selection: a share is of rows in this process; sites hold theirs: name a file",
        ),
        ([BEST, "eval.warmup=4"], ["heldout"], "eval.warmup: 4 rounds of 4 leave none to choose"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(changes: list[str], splits: list[str], line: str | None) -> None:
    run = run_of(*changes)
    if line is None:
        check_choice(run, splits)
        return
    with pytest.raises(ConfigError) as caught:
        check_choice(run, splits)
    assert str(caught.value) == line


def test_the_selection_chooses_where_there_is_one() -> None:
    assert choice_of(run_of()) is None
    assert choice_of(run_of("data.selection=0.1")) == "selection"
    assert choice_of(run_of(BEST, "data.selection=0.1", "eval.on=heldout")) == "heldout"


def test_why_a_run_ends() -> None:
    def stands(**now: Any) -> Any:
        return {"round": 4, "loss": 1.5, "on": "heldout", "best": 2, "best_loss": 1.25, "waited": 2} | now

    assert stop_of(run_of()) is None
    patient = stop_of(run_of("eval.every=1", "eval.patience=2"))
    assert patient is not None
    assert patient(stands(waited=1)) is None
    assert patient(stands()) == "2 evaluations on heldout no better than 1.2500 after round 2 (eval.patience)"
    assert "no finite loss" in str(patient(stands(best=None, best_loss=None, loss=None)))
    target = stop_of(run_of("eval.every=1", "eval.target=1.5"))
    assert target is not None
    assert target(stands()) == "the loss on heldout is 1.5000, and eval.target 1.5"
    assert target(stands(loss=1.51)) is None
    assert target(stands(loss=None)) is None
