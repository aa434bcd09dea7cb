"""A run under an agreement, as a user looks back on it: show, contributions, audit, the page."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from test_cli import refused, thinwire
from tiny import CHOICES, tiny_folder, tiny_rows, write_jsonl

from thinwire import assemble, config, wire
from thinwire.assemble.replay import Replay
from thinwire.evaluate.splits import Split, evaluate
from thinwire.keys import Key
from thinwire.records import read_records
from thinwire.report.page import client_table
from thinwire.report.runs import collect
from thinwire.runtime import checkpoint
from thinwire.train.weights import fill
from thinwire.wire import Frame

METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg", "steps": 2, "batch_size": 4, "lr": 1e-2},
    "gradualdiff": {"name": "gradualdiff", "steps": 2, "batch_size": 4, "lr": 1e-2},
    "fedkseed": {"name": "fedkseed", "steps": 4, "batch_size": 4, "lr": 1e-4, "seeds": 64},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have ended, beside the model, the rows and public ones."""
    place = tmp_path_factory.mktemp("agreed")
    tiny_folder(place / "model")
    write_jsonl(place / "rows.jsonl", tiny_rows(60, closed=True))
    write_jsonl(place / "public.jsonl", tiny_rows(8, 5, closed=True))
    for name, method in METHODS.items():
        tree = {
            "name": name,
            "rounds": 2,
            "threads": 1,
            "model": {"path": str(place / "model")},
            "data": {
                "path": str(place / "rows.jsonl"),
                "public": str(place / "public.jsonl"),
                "partition": "size",
                "clients": 4,
                "selection": 0.1,
                "prompt": "{input}: it was",
                "answer": " {output}",
                "choices": list(CHOICES),
                "max_length": 64,
            },
            "method": method,
            "eval": {"rows": 8, "keep": "best", "every": 1},
            "federation": {"evaluate": True, "keep_replies": True, "weights": {"by": "examples", "cap": 0.4}},
        }
        (place / f"{name}.toml").write_text(tomli_w.dumps(tree))
        result = thinwire("run", place / f"{name}.toml", "--out", place / name)
        assert result.code == 0, result.err
    return place


def test_the_end_of_a_run_has_a_line_a_client(place: Path) -> None:
    result = thinwire("show", place / "fedavg")
    assert result.code == 0
    record = read_records(place / "fedavg" / "rounds.jsonl")[-1]
    assert sum(visit["share"] for visit in record["clients"]) == pytest.approx(1)
    assert max(visit["share"] for visit in record["clients"]) <= 0.4
    for visit in record["clients"]:
        line = next(line for line in result.out.splitlines() if visit["name"] in line)
        assert f"{visit['share']:.1%}" in line
    assert "capped" in result.out
    assert "chosen by the loss on selection" in result.out
    assert refused("show", place) == f"{place}: no run that has ended is there"


def test_the_rows_that_choose_are_nobodys_and_unreported(place: Path) -> None:
    summary = json.loads((place / "fedavg" / "summary.json").read_text())
    assert summary["kept"]["on"] == "selection"
    assert {row["split"] for row in summary["final"]} == {"heldout", "sites_train"}
    assert "selection" in {row["split"] for row in read_records(place / "fedavg" / "evals.jsonl")}
    card = (place / "fedavg" / "model" / "README.md").read_text()
    assert f"round {summary['kept']['round']}, which the loss on selection rows has chosen" in card
    assert "| selection" not in card


@pytest.mark.parametrize("name", METHODS)
def test_contributions_are_those_of_the_definition(name: str, place: Path, tmp_path: Path) -> None:
    """Every set of the four clients' replies, the round done again with each."""
    before = {path: path.read_bytes() for path in (place / name / "state").rglob("*") if path.is_file()}
    result = thinwire("contributions", place / name)
    assert result.code == 0, result.err
    assert "round 2, 4 replies, Shapley values exactly: at most 16 times the round's mean" in result.out
    assert {path: path.read_bytes() for path in (place / name / "state").rglob("*") if path.is_file()} == before
    assert not list((place / name).glob(".contributions*"))
    found = json.loads((place / name / "contributions.json").read_text())
    (tmp_path / "work").mkdir()
    replay = Replay(place / name, tmp_path / "work")
    sets = [frozenset(some) for size in range(5) for some in itertools.combinations(range(4), size)]
    value = {some: -replay.loss(some) for some in sets}
    whole = frozenset(range(4))
    for client in range(4):
        line = found["clients"][str(client)]
        assert line["leave_one_out"] == pytest.approx(value[whole] - value[whole - {client}], abs=1e-9)
        orders = list(itertools.permutations(range(4)))
        gains = []
        for order in orders:
            first = frozenset(order[: order.index(client)])
            gains.append(value[first | {client}] - value[first])
        assert line["shapley"] == pytest.approx(math.fsum(gains) / len(orders), abs=1e-9)
        assert line["error"] == 0
    assert (found["before"], found["after"]) == pytest.approx((-value[frozenset()], -value[whole]), abs=1e-9)


def test_the_whole_round_again_is_the_state_of_the_run(place: Path, tmp_path: Path) -> None:
    """The value of all replies is that of the weights which the run had then."""
    (tmp_path / "work").mkdir()
    replay = Replay(place / "gradualdiff", tmp_path / "work")
    replay.loss(frozenset(range(4)))
    again = replay.net.state_sha256()
    method = replay.run.method
    method.materialise(checkpoint.on_disk(place / "gradualdiff" / "state", 2, method.State), replay.net)
    assert replay.net.state_sha256() == again


def test_an_estimate_has_its_cost_and_its_error(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "fedkseed", tmp_path / "run")
    result = thinwire("contributions", tmp_path / "run", "--orders", 3)
    assert "from 3 random orders: at most 15 times" in result.out
    found = json.loads((tmp_path / "run" / "contributions.json").read_text())
    lines = found["clients"].values()
    assert sum(line["shapley"] for line in lines) == pytest.approx(found["before"] - found["after"], abs=1e-9)
    assert all(line["error"] > 0 for line in lines)


def test_what_is_not_there_is_named(place: Path, tmp_path: Path) -> None:
    assert "not a run's folder" in refused("contributions", place)
    shutil.copytree(place / "fedkseed", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "replies")
    assert "federation.keep_replies = true keeps them" in refused("contributions", tmp_path / "run")
    text = (tmp_path / "run" / "run.toml").read_text()
    (tmp_path / "run" / "run.toml").write_text("".join(x for x in text.splitlines(True) if "public" not in x))
    assert refused("contributions", tmp_path / "run").startswith("data.public: missing")
    (tmp_path / "run" / "audit.jsonl").unlink()
    assert "no audit.jsonl is there" in refused("audit", tmp_path / "run")


@pytest.mark.parametrize("name", ["fedavg", "onebit"])
def test_what_each_has_learnt_is_scored_on_the_rows_of_each(name: str, place: Path, tmp_path: Path) -> None:
    """Of factors that are averaged: each reply's own weights on each client's rows, by hand."""
    tree = tomllib.loads((place / "fedavg.toml").read_text())
    tree["model"]["lora"] = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    tree["method"] |= {"name": name}
    tree["data"] = {field: value for field, value in tree["data"].items() if field not in ("public", "selection")}
    tree["eval"] = {"rows": 8}
    if name == "fedavg":
        tree["method"] |= {"aggregation": "median", "server_step": "momentum"}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tree))
    run = tmp_path / "run"
    assert thinwire("run", tmp_path / "run.toml", "--out", run).code == 0
    result = thinwire("contributions", run, "--matrix")
    assert result.code == 0, result.err
    found = json.loads((run / "cross.json").read_text())
    settings = config.load(run / "run.toml")
    net = assemble.net_of(settings, remember=True)
    rows = assemble.rows_of(settings.data, Key.root(settings.seed)).clients
    splits = [
        Split(client, replace(data, examples=data.examples[:8]))
        for client, held in rows.items()
        for data in [assemble.dataset(settings.data, held, net.tokenizer)]
    ]
    count = sum(len(split.data) for split in splits)
    assert f"2, 4 replies on the rows of 4 clients: 5 models, and 5 times {count} rows forward" in result.out
    last = checkpoint.on_disk(run / "state", 2, settings.method.State)
    settings.method.materialise(last, net)
    assert found["together"] == pytest.approx([evaluate(net, split).loss for split in splits], abs=1e-6)
    if name == "onebit":
        return
    for client in range(4):
        frame = Frame.load(run / "replies" / "round-000002" / f"{client}.frame")
        fill(net, wire.decode(settings.method.Up, frame).weights)
        want = [evaluate(net, split).loss for split in splits]
        assert found["clients"][str(client)]["losses"] == pytest.approx(want, abs=1e-6)
    assert len({loss for line in found["clients"].values() for loss in line["losses"]}) > 8


def test_a_matrix_is_of_adapters_and_cores(place: Path) -> None:
    line = "model.view: adapters and cores are compared, and this run trains whole models"
    assert refused("contributions", place / "fedavg", "--matrix") == line


def test_a_choice_without_rows_is_refused_before_anything_is_shown(place: Path, tmp_path: Path) -> None:
    text = (place / "fedavg.toml").read_text().replace("selection = 0.1\n", "heldout = 0\n")
    (tmp_path / "run.toml").write_text(text)
    given = ("run", tmp_path / "run.toml", "federation.evaluate=false", "--out", tmp_path / "run")
    why = "eval.patience, eval.target, eval.keep: no rows are held out to show which round is better"
    assert refused(*given) == why
    assert thinwire(*given).out == ""


def test_an_audit_says_what_it_found(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "fedavg", tmp_path / "run")
    result = thinwire("audit", tmp_path / "run")
    assert (result.code, "4 lines, 2 rounds, the run has ended" in result.out) == (0, True)
    head = json.loads((tmp_path / "run" / "summary.json").read_text())["audit"]
    assert thinwire("audit", tmp_path / "run", "--head", head).code == 0
    other = thinwire("audit", tmp_path / "run", "--head", "0" * 64)
    assert (other.code, "no line has the hash" in other.err) == (1, True)
    lines = (tmp_path / "run" / "audit.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "audit.jsonl").write_text("".join([lines[0], *lines[2:]]))
    result = thinwire("audit", tmp_path / "run")
    assert (result.code, "audit.jsonl:2: has line 3: the lines lack line 2: it was removed" in result.err) == (1, True)


def test_the_page_has_a_line_a_client(place: Path) -> None:
    (run,) = collect([place / "fedavg"])
    table = client_table(run)
    assert table is not None
    heads, lines = table
    assert heads[:4] == ["client", "rows", "rounds counted", "share"]
    assert heads[-3:] == ["leave-one-out", "Shapley value", "why this share, in its last round"]
    assert len(lines) == 4
    assert all(len(line) == len(heads) for line in lines)


def test_replies_are_held_to_the_log_of_their_site(place: Path, tmp_path: Path) -> None:
    """A site's own log, as its worker writes it, but for one reply that it has sent in another form."""
    run = place / "fedavg"
    begin, *lines = (json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines())
    rounds = [(line["round"], line["counted"][0]) for line in lines if line["event"] == "round"]

    def write(file: Path, changed: int | None) -> None:
        before = b""
        for number, reply in rounds:
            sent = "0" * 64 if number == changed else reply["sha256"]
            entry = {"direction": "out", "action": "train", "run": begin["run"], "round": number, "client": reply["id"]}
            entry |= {"sha256": sent, "verdict": "passed"}
            entry["before"] = hashlib.sha256(before).hexdigest() if before else "0" * 64
            before = json.dumps(entry).encode()
            with file.open("ab") as log:
                log.write(before + b"\n")

    write(tmp_path / "same.jsonl", None)
    assert thinwire("audit", run, "--site", tmp_path / "same.jsonl").code == 0
    write(tmp_path / "other.jsonl", 2)
    result = thinwire("audit", run, "--site", tmp_path / "other.jsonl")
    assert (result.code, f"the reply of {rounds[0][1]['name']} in round 2 is none that it has sent" in result.err) == (
        1,
        True,
    )
    (tmp_path / "empty.jsonl").touch()
    assert "has no reply to this run" in thinwire("audit", run, "--site", tmp_path / "empty.jsonl").err
