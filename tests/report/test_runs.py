"""What is read from run folders, and what is reported of those that are not right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import run_folder

from thinwire.data.errors import DataError
from thinwire.report.runs import collect


def test_bytes_and_seconds_add_up(tmp_path: Path) -> None:
    (run,) = collect([run_folder(tmp_path / "a")])
    assert run.after == {0: (0, 0.0), 1: (1600, 2.5), 2: (3200, 5.0), 3: (4800, 7.5), 4: (6400, 10.0)}
    first, last = run.ends("heldout") or ({}, {})
    assert (first["round"], last["round"]) == (0, 4)


def test_a_folder_stands_for_the_runs_below_it_without_those_that_tune(tmp_path: Path) -> None:
    for name in ("fedavg/final/seed-0", "fedavg/final/seed-1", "fedavg/tune/lr-1"):
        run_folder(tmp_path / name, seed=int(name[-1]))
    cost = tmp_path / "fedavg" / "cost"
    cost.mkdir()
    (cost / "cost.json").write_text(json.dumps({"client_memory": 7, "server_memory": 5}))
    runs = collect([tmp_path])
    assert [run.label for run in runs] == ["fedavg, seed 0", "fedavg, seed 1"]
    assert [run.cost for run in runs] == [{"client_memory": 7, "server_memory": 5}] * 2
    assert len(collect([tmp_path / "fedavg/tune/lr-1"])) == 1  # asked for by its own name it is shown


def test_a_run_that_goes_on_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 5, "cli')
    (run,) = collect([folder])
    assert len(run.rounds) == 4
    assert run.summary is None


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("rounds.jsonl", "nonsense\n{}\n", "rounds.jsonl:1: not JSON"),
        ("rounds.jsonl", "[1]\n", "rounds.jsonl:1: not a record of a round"),
        ("rounds.jsonl", '{"round": 1, "bytes_down": 3}\n', "round 1 lacks 'bytes_up'"),
        ("run.toml", "= 3", "run.toml: not TOML"),
        ("summary.json", "{", "summary.json: not JSON"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    folder = run_folder(tmp_path / "a")
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        collect([folder])


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        collect([tmp_path])
    with pytest.raises(DataError, match="not a folder"):
        collect([tmp_path / "absent"])
