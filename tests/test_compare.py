"""thinwire compare: what is planned, what is refused before anything runs, and one small comparison."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused, thinwire
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire import compare, config
from thinwire.compare import Plan, Settings
from thinwire.compare.measure import Cost
from thinwire.compare.plan import first_cohort
from thinwire.config import ConfigError
from thinwire.core import Method
from thinwire.records import read_records
from thinwire.wire import Stale

ALL = ["base", "local", "centralised", "fedavg", "fedit", "fedzo", "fedkseed", "fedkseed-pro"]
TREE: dict[str, Any] = {
    "rounds": 6,
    "data": {"path": "rows.jsonl", "clients": 4},
    "method": {"name": "fedkseed", "seeds": 64, "steps": 20, "batch_size": 2},
    "cohort": {"kind": "uniform", "n": 3},
}
OWN: dict[str, Any] = {"fedavg": {"method": {"steps": 5, "batch_size": 2}}, "fedit": {"method": {"steps": 5}}}


def plan(name: str, control: bool = False, **settings: Any) -> Plan:
    return compare.plans(TREE, Settings(**{"methods": OWN} | settings), [name, "fedavg"], control)[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows and compare.toml."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_folder(folder / "model")
    write_jsonl(folder / "rows.jsonl", tiny_rows(60, closed=True))
    (folder / "compare.toml").write_text(
        f"""
name = "tiny"
rounds = 3
[model]
path = "{folder / "model"}"
[data]
path = "{folder / "rows.jsonl"}"
clients = 2
heldout = 10
prompt = "{{input}}: it was"
answer = " {{output}}"
choices = ["great", "terrible"]
[method]
name = "fedavg"
lr = 3e-3
steps = 4
batch_size = 4
[compare]
seeds = [0, 1]
grid = [0.001, 1.0]
target = 0.6
validation = 0.3
"""
    )
    return folder


def test_the_first_cohort_is_that_of_the_run(place: Path, tmp_path: Path) -> None:
    """A budget in bytes is reckoned over the clients that the run then asks."""
    changes = ["data.clients=6", 'cohort={kind="uniform",n=2}', "rounds=1", "method.steps=1"]
    run = config.load(place / "compare.toml", changes)
    assert thinwire("run", place / "compare.toml", *changes, "--out", tmp_path / "run").code == 0
    (record,) = read_records(tmp_path / "run" / "rounds.jsonl")
    assert first_cohort(run, 6) == [visit["id"] for visit in record["clients"]]


def test_every_name_is_a_run_of_the_same_data_and_cohorts() -> None:
    made = compare.plans(TREE, Settings(methods=OWN), ALL, False)
    assert [p.name for p in made] == ALL
    runs = {p.name: p.run_of(0, None) for p in made}
    for name, run in runs.items():
        assert run.data.model_copy(update={"pooled": False}) == runs["fedkseed"].data, name
        assert run.rounds == 6
        assert run.cohort == runs["fedkseed"].cohort or name == "centralised"
    assert runs["fedit"].model.lora is not None
    assert runs["fedavg"].model.lora is None
    assert runs["fedkseed-pro"].method.model_dump() == runs["fedkseed"].method.model_dump() | {"pro": True}


def test_centralised_training_makes_as_many_steps_as_all_clients() -> None:
    run = plan("centralised", methods={"centralised": {"method": {"steps": 5}}}).run_of(0, None)
    assert run.data.pooled
    assert run.method.model_dump()["steps"] == 3 * 5


def test_alone_is_a_run_for_each_seed_and_client() -> None:
    jobs = plan("local").final()
    assert sorted(jobs) == [(seed, client) for seed in (0, 1, 2) for client in range(4)]
    assert all(job.run.cohort[0].model_dump()["clients"] == (client,) for (_, client), job in jobs.items())


def test_a_few_clients_may_stand_for_all_that_are_alone() -> None:
    assert plan("local", alone=2).clients == (0, 2)
    assert plan("local", alone=9).clients == (0, 1, 2, 3)


def test_a_method_may_have_seeds_and_a_grid_of_its_own() -> None:
    own: dict[str, Any] = {"fedkseed": {"seeds": [4, 5]}, "fedavg": {"control_seeds": [6]}}
    own["fedzo"] = {"control_seeds": [], "grid": []}
    made = compare.plans(TREE, Settings(methods=own, seeds=(0,)), ["base", "fedkseed", "fedavg", "fedzo"], True)
    assert {p.title: p.seeds for p in made} == {
        "base": (0,),
        "fedkseed": (4, 5),
        "fedkseed, shuffled": (4, 5),
        "fedavg": (0,),
        "fedavg, shuffled": (6,),
        "fedzo": (0,),
    }
    assert made[-1].tuning() == {}
    assert [job.run.seed for job in made[1].final().values()] == [4, 5]
    assert {job.run.seed for job in made[1].tuning().values()} == {4}


def test_what_nobody_looks_at_is_not_scored() -> None:
    made = compare.plans(TREE | {"eval": {"every": 1, "generate": 8}}, Settings(), ["fedavg"], True)
    assert {(job.run.eval.every, job.run.eval.generate) for job in made[0].tuning().values()} == {(0, 0)}
    assert [{job.run.eval.every for job in p.final().values()} for p in made] == [{1}, {0}]


def test_tuning_is_on_rows_that_are_not_held_out_ones() -> None:
    jobs = plan("fedavg", grid=(3.0, 0.5)).tuning()
    assert list(jobs) == [1e-5, 6e-5]
    assert all(job.run.data.validation == 0.1 and job.run.seed == 0 for job in jobs.values())
    assert all(job.run.data.validation == 0 for job in plan("fedavg").final().values())


def test_a_budget_of_passes_buys_rounds_by_their_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TREE, "rounds", 20)
    # FedAvg: 5 steps of 2 rows at 3 passes each; on factors alone the gradient of the weights falls away
    rounds = {
        name: plan(name, budget="passes", amount=320).run_of(0, None).rounds for name in ("fedavg", "fedit", "fedkseed")
    }
    assert rounds == {"fedavg": 320 // 30, "fedit": 320 // 80, "fedkseed": 320 // 80}


def test_a_budget_that_buys_nobody_a_round_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compare.amount: .* 15 passes buy less than a round, .* a client 80"):
        compare.plans(TREE, Settings(methods=OWN, budget="passes", amount=15), ["fedkseed", "fedit"], False)


COST = Cost(
    newcomer_bytes=900, returning_bytes=300, client_seconds=4, server_seconds=1, client_memory=7, server_memory=8
)


def test_measured_budgets_buy_rounds_by_what_two_rounds_apart_cost() -> None:
    rounds = {}
    for budget, amount in (("seconds", 17.0), ("bytes", 1600.0), ("bytes", 1e9)):
        settings = Settings(methods=OWN, budget=budget, amount=amount)
        made = compare.plans(TREE, settings, ["local", "centralised", "fedkseed", "fedavg"], False)
        assert {p.rounds for p in made if p.name not in compare.ALONE} == {None}  # not known before it is measured
        assert made[2].final() == {}
        for p in made:
            p.cost = replace(COST, newcomer_bytes=10**7) if p.name == "fedavg" else COST
        compare.settle(made, settings)
        rounds[budget, amount] = {p.name: p.rounds for p in made}
        notes = {p.name: p.note for p in made}
    # a visit of centralised training makes the steps of three clients; alone and in one place no bytes need travel
    assert rounds["seconds", 17.0] == {"local": 4, "centralised": 6, "fedkseed": 4, "fedavg": 4}
    assert rounds["bytes", 1600.0] == {"local": 6, "centralised": 6, "fedkseed": 3, "fedavg": 0}
    assert rounds["bytes", 1e9] == {"local": 6, "centralised": 6, "fedkseed": 6, "fedavg": 6}
    assert notes["fedkseed"] == "the budget would buy 3,333,331 rounds"


def test_a_method_that_cannot_afford_a_round_reports_it_in_its_line(tmp_path: Path) -> None:
    settings = Settings(methods=OWN, budget="bytes", amount=1600.0)
    made = compare.plans(TREE, settings, ["fedavg", "fedkseed"], False)
    for p in made:
        p.cost = replace(COST, newcomer_bytes=10**7) if p.name == "fedavg" else COST
    compare.settle(made, settings)
    line = compare.line(made[0], made, tmp_path, None)
    assert line is not None
    assert line.note == "1600 bytes buy less than a round, which costs a client 1e+07"
    assert made[0].tuning() == made[0].final() == {}


def test_a_method_that_does_not_report_its_passes_has_no_such_budget() -> None:
    own = {"mine": {"method": {"path": "quiet:Quiet"}}}
    with pytest.raises(ConfigError, match=r"compare.budget: the method of mine does not report how many passes"):
        compare.plans(TREE, Settings(methods=own, budget="passes", amount=100), ["mine"], False)
    made = compare.plans(TREE, Settings(methods=own), ["mine"], False)
    assert made[0].rounds == 6
    assert made[0].tuning() == {}  # it has no rate either


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module with a method that reports nothing of itself."""
    module = types.ModuleType("quiet")
    payloads = {"Down": Stale, "Up": Stale, "State": Stale}
    module.Quiet = type("Quiet", (Method,), {"__module__": "quiet"} | payloads)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quiet", module)


def test_a_run_that_diverged_has_its_line(tmp_path: Path) -> None:
    made = compare.plans(TREE, Settings(methods=OWN, grid=(), seeds=(0, 1)), ["base", "fedavg"], False)
    for (seed, _), job in made[1].final().items():
        folder = tmp_path / job.name
        folder.mkdir(parents=True)
        score = {"split": "heldout", "loss": 1.0, "accuracy": None, "rouge_l": None, "bleu": None}
        last = score | {"loss": None if seed else 0.5}
        totals = {"bytes_down": 1, "bytes_up": 1}
        (folder / "summary.json").write_text(json.dumps(totals | {"first": [score], "final": [last]}))
        (folder / "evals.jsonl").write_text(json.dumps(last | {"round": 6}) + "\n")
    lines = [compare.line(plan, made, tmp_path, target=0.6) for plan in made]
    base, fedavg = (line for line in lines if line is not None)
    assert base.scores == {"heldout loss": (1.0, 0.0)}
    assert math.isnan(fedavg.scores["heldout loss"][0])
    assert (fedavg.trained, fedavg.target_round) == (None, None)


def test_how_often_a_run_was_scored_makes_no_other_run_of_it(tmp_path: Path) -> None:
    made = compare.plans(TREE, Settings(methods=OWN, grid=()), ["fedavg"], False)
    job = made[0].final()[0, 0]
    folder = tmp_path / job.name
    folder.mkdir(parents=True)
    for field, value in (("every", 3), ("rows", 3)):
        scored = job.run.model_copy(update={"eval": job.run.eval.model_copy(update={field: value})})
        (folder / "run.toml").write_text(scored.to_toml())
        if field == "every":
            compare.check_output(made, tmp_path)
        else:
            with pytest.raises(ConfigError, match=r"holds another run: eval.rows is 3 there, 256 here"):
                compare.check_output(made, tmp_path)


def test_machines_share_the_names() -> None:
    made = compare.plans(TREE, Settings(methods=OWN), ALL, True)
    parts = [compare.share(made, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in made)
    assert all({p.name for p in part} & {q.name for q in other} == set() for part, other in itertools.pairwise(parts))
    for bad in ("0/2", "3/2", "x", "1"):
        with pytest.raises(ConfigError, match="--part"):
            compare.share(made, bad)


def test_what_is_wrong_is_reported_before_anything_runs(place: Path, tmp_path: Path) -> None:
    file = place / "compare.toml"
    assert "'fedsgd' is not known; known: base, centralised, cgfed, fedavg" in refused(
        "compare", file, "--methods", "fedsgd", "--out", tmp_path
    )
    assert "needs a method beside" in refused("compare", file, "--methods", "base", "--out", tmp_path)
    assert "compare.seeds" in refused("compare", file, "compare.seeds=3", "--out", tmp_path)
    assert "compare.methods: " in refused("compare", file, "compare.methods.fedavg.seeds=[-1]", "--out", tmp_path)
    assert "fedavg.grid: Input should be greater" in refused(
        "compare", file, "compare.methods.fedavg.grid=[-1]", "--out", tmp_path
    )
    assert "compare.grid" in refused("compare", file, "compare.grid=[0]", "--out", tmp_path)
    alone = ("compare", file, "--methods", "base,fedit", "--out", tmp_path)
    assert "no linear layer is called c_attn; there are: down_proj" in refused(
        *alone, "compare.methods.fedit.model.lora.targets=['c_attn']"
    )
    assert "model.lora.rank: 17 is more than" in refused(*alone, "compare.methods.fedit.model.lora.rank=17")
    assert "lacks" in refused(*alone, f"model.path={tmp_path}")
    assert "method.lrr: unknown field" in refused("compare", file, "method.lrr=3", "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_small_comparison(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", place / "compare.toml", "--methods", "base,fedavg", "--control", "--out", out]
    result = thinwire(*arguments)
    assert result.code == 0, result.err
    assert "3e-06" in result.out
    assert "0.003" in result.out
    assert "taken, at the edge of the grid" in result.out
    assert "fedavg, shuffled" in result.out
    table = json.loads((out / "table.json").read_text())
    lines = {line["name"]: line for line in table["lines"]}
    assert list(lines) == ["base", "fedavg", "fedavg, shuffled"]
    base, fedavg, control = lines.values()
    assert base["scores"]["heldout loss"][0] > fedavg["scores"]["heldout loss"][0]
    assert fedavg["scores"]["heldout loss"][0] < control["scores"]["heldout loss"][0]
    assert (fedavg["seeds"], fedavg["steps"], fedavg["passes"], fedavg["lr"]) == (2, 3 * 2 * 4, 3 * 2 * 4 * 4 * 3, 3e-3)
    summaries = [json.loads((out / f"fedavg/final/seed-{seed}/summary.json").read_text()) for seed in (0, 1)]
    assert fedavg["bytes_up"] == sum(summary["bytes_up"] for summary in summaries) / 2
    # each side was measured in a process of its own, and neither held the other's work
    assert fedavg["client_memory"] > 0
    assert fedavg["server_memory"] > 0
    assert fedavg["visit_seconds"] > 0
    assert fedavg["curve"][0] == [0, 0, base["scores"]["heldout loss"][0]]
    assert fedavg["curve"][-1][1:] == [fedavg["bytes_up"] + fedavg["bytes_down"], fedavg["scores"]["heldout loss"][0]]
    assert not list(out.rglob("*.safetensors"))  # records, no weights
    assert list(table["grids"]["fedavg"]) == ["3e-06", "0.003"]
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["name"] for row in rows] == list(lines)
    assert float(rows[1]["heldout loss"]) == fedavg["scores"]["heldout loss"][0]

    # again: nothing is run again, the table is the same; and other settings are refused
    before = (out / "fedavg/final/seed-0/summary.json").stat().st_mtime_ns
    again = thinwire(*arguments)
    assert "running" not in again.out
    assert json.loads((out / "table.json").read_text()) == table
    assert (out / "fedavg/final/seed-0/summary.json").stat().st_mtime_ns == before
    assert "holds another run: method.steps is 4 there, 5 here" in refused(*arguments, "method.steps=5")


def test_a_control_has_no_round_to_choose() -> None:
    """eval.patience counts evaluations, of which a control has none on the way."""
    tree = TREE | {"eval": {"every": 1, "patience": 2, "keep": "best", "target": 0.1, "on": "heldout"}}
    run, control = compare.plans(tree, Settings(methods=OWN), ["fedavg"], True)
    assert run.run_of(0, None).eval.patience == 2
    found = control.run_of(0, None).eval
    assert (found.every, found.patience, found.keep, found.target, found.on) == (0, 0, "last", None, None)
