"""Where a run or a site stands, by files written by hand: no model is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import Result, refused, thinwire

from thinwire.federation.seen import Seen
from thinwire.operations.drops import ALL, kind_of
from thinwire.operations.folders import holder
from thinwire.operations.status import run_status
from thinwire.runtime.folder import locked

RUN = """name = "silos"
rounds = 5
[method]
name = "fedkseed"
[federation]
sites = ["north", "south"]
"""
SITE = {"name": "north", "data": "/rows.jsonl", "folder": "site", "socket": ""}


def a_run(folder: Path, rounds: int = 3) -> Path:
    """Rounds in which south is late once, and left out once."""
    (folder / "federation").mkdir(parents=True)
    (folder / "run.toml").write_text(RUN)
    with (folder / "rounds.jsonl").open("w") as file:
        for round in range(1, rounds + 1):
            north = {"id": 0, "name": "north", "bytes_down": 100, "bytes_up": 40, "seconds": 1.0}
            south: dict[str, Any] = {"id": 1, "name": "south", "bytes_down": 100, "bytes_up": 0, "seconds": 1.0}
            south |= {2: {"error": "late: no reply within 4 seconds"}, 3: {"left_out": "beyond the bound"}}.get(
                round, {}
            )
            record = {"round": round, "clients": [north, south], "bytes_down": 200, "bytes_up": 40, "seconds": 2.0}
            file.write(json.dumps(record | {"metrics": {"loss": 2.5 / round}}) + "\n")
    (folder / "evals.jsonl").write_text('{"round": 0, "split": "heldout", "loss": 2.75, "perplexity": 15.6}\n')
    return folder


def a_site(folder: Path) -> Path:
    """A site that has answered two rounds, one of them twice, refused a frame, and is at work on another."""
    folder.mkdir(parents=True)
    (folder / "site.json").write_text(json.dumps(SITE))
    lines = []
    for round, way, verdict, size in (
        (1, "in", "passed", 10),
        (1, "out", "passed", 20),
        (2, "in", "passed", 10),
        (2, "out", "passed", 20),
        (2, "in", "passed", 10),
        (2, "out", "passed", 20),
        (3, "in", "refused: this site's policy does not allow the method fedavg", 99),
        (3, "in", "passed", 10),
    ):
        about = {"time": "2026-11-01T10:00:00Z", "direction": way, "action": "train", "method": "fedkseed"}
        lines.append(about | {"run": 7, "round": round, "client": 0, "bytes": size, "verdict": verdict})
    (folder / "audit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    (folder / "notices.txt").write_text("north: does not train: no rows\n")
    return folder


def found(result: Result) -> Any:
    """The JSON that a command printed."""
    return json.loads(result.out)


def test_a_run_that_goes_on_is_running_and_one_that_nobody_works_on_can_go_on(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    with locked(run):
        result = thinwire("status", run, "--json")
    assert result.code == 0
    on = found(result)
    assert (on["state"], on["pid"], on["round"], on["rounds"], on["left"]) == ("running", os.getpid(), 3, 5, 4.0)
    assert (on["bytes_down"], on["bytes_up"], on["loss"]) == (600, 120, 2.5 / 3)
    assert [(c["name"], c["replies"], c["dropped"], c["round"]) for c in on["clients"]] == [
        ("north", 3, 0, 3),
        ("south", 1, 2, 1),
    ]
    assert [(drop["round"], drop["kind"]) for drop in on["drops"]] == [(2, "late"), (3, "left out")]
    (run / "federation" / "status.json").write_text('{"pid": 1, "state": "stopped", "error": "too few sites: 1"}')
    result = thinwire("status", run)
    assert result.code == 75
    assert "silos: fedkseed, stopped: too few sites: 1" in result.out
    assert "3 of 5 rounds, 2 to go" in result.out
    assert "late 1, left out 1" in result.out
    (run / "summary.json").write_text('{"rounds": 3, "ended": "the loss is below 1"}')
    result = thinwire("status", run)
    assert (result.code, "ended: the loss is below 1" in result.out) == (0, True)


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from thinwire.runtime.folder import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    run = a_run(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert holder(run) == process.pid
        process.kill()
    assert (run / ".lock").exists()
    assert holder(run) is None
    assert run_status(run).state == "stopped"


def test_a_site_has_what_it_answered_and_what_it_refused(tmp_path: Path) -> None:
    site = a_site(tmp_path / "site")
    assert thinwire("status", site).code == 75
    with locked(site):
        status = found(thinwire("status", site, "--json"))
        text = thinwire("status", site).out
    assert (status["name"], status["state"], status["asked"]) == ("north", "running", True)
    [served] = status["runs"]
    assert (served["run"], served["rounds"], served["round"], served["bytes_in"]) == ("00000007", 2, 2, 40)
    assert served["bytes_out"] == 60
    assert served["refused"] == {"refused: this site's policy does not allow the method fedavg": 1}
    assert "a visit is under way" in text
    assert "does not allow the method fedavg" in text
    assert "does not train: no rows" in text


def test_a_folder_of_runs_and_sites_shows_each_and_another_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path / "runs" / "silos")
    a_site(tmp_path / "site")
    assert [each["kind"] for each in found(thinwire("status", tmp_path, "--json"))] == ["run", "site"]
    (tmp_path / "none").mkdir()
    assert "neither the folder of a run nor that of a site" in refused("status", tmp_path / "none")
    assert refused("status", tmp_path / "gone") == f"{tmp_path / 'gone'}: not a folder"


def test_a_record_that_is_being_written_costs_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    for name in ("rounds.jsonl", "evals.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"round": 4, "cli')
    (run / "federation" / "seen.json").write_text("{")
    assert run_status(run).round == 3


def test_sites_are_seen_when_they_are_connected_and_when_they_answer(tmp_path: Path) -> None:
    run, names = a_run(tmp_path / "run"), ["north", "south"]
    seen = Seen(run, names)
    seen.connected({0})
    names.append("west")
    seen.members({0, 2})
    north, south, west = run_status(run).clients
    assert (north.connected, south.connected, west.connected) == (True, False, None)
    assert north.seen is not None
    assert abs(north.seen - time.time()) < 60
    assert (south.seen, west.name) == (None, "west")
    assert [client.member for client in (north, south, west)] == [True, False, True]
    seen.written = 0.0
    seen.answered(1)
    assert run_status(run).clients[1].seen is not None
    assert Seen(run, names).sites == seen.sites


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("late: no reply within 4 seconds", "late"),
        ("not connected", "away"),
        ("the engine reports: Node Unavailable (code 5)", "engine"),
        ("the site's worker died at work", "worker"),
        ("its rows cannot be used, or its work with them failed; its own log says why", "worker"),
        ("Illegal: 7 scalars for 8 steps", "illegal"),
        ("Illegal: this site's policy does not allow the method fedavg", "refused"),
        ("north cannot take part: another base model", "refused"),
        ("no reply", "other"),
    ],
)
def test_reasons_have_kinds(reason: str, kind: str) -> None:
    assert kind_of(reason) == kind
    assert kind in ALL


def test_status_needs_no_torch(tmp_path: Path) -> None:
    a_run(tmp_path / "runs" / "silos")
    a_site(tmp_path / "site")
    code = (
        "import sys; from typer.testing import CliRunner; from thinwire.cli import app\n"
        f"assert CliRunner().invoke(app, ['status', {str(tmp_path)!r}]).exit_code == 75\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'thinwire.runtime', 'thinwire.config')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
