"""What a federation survives: each test kills a process with signal 9, and the run goes on to a state that is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from crashing import ROUNDS, VICTIM, Ends, Stage, Victim
from silos import state_of, visits

from thinwire.federation.local import Local
from thinwire.federation.processes import below
from thinwire.federation.server_app import Status

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage.make(tmp_path_factory.mktemp("silos"), "flower", 3, 200)


@pytest.fixture(scope="module")
def ends(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return stage.ends(tmp_path_factory.mktemp("ends"))


def of_site(local: Local, name: str) -> int:
    return local.sites[list(local.sites)[VICTIM]].children.running[name].pid


def client_app(local: Local) -> int | None:
    return next((pid for pid, command in below(of_site(local, "supernode")) if "flwr-clientapp" in command), None)


def worker(local: Local) -> int | None:
    return of_site(local, "worker")


def node(local: Local) -> int | None:
    return of_site(local, "supernode")


def hub(local: Local) -> int | None:
    return local.server.children.running["superlink"].pid


@pytest.mark.parametrize("victim", [client_app, worker, node], ids=["ClientApp", "worker", "SuperNode"])
def test_a_dead_process_at_a_site_makes_it_absent_for_the_round(
    victim: Victim, stage: Stage, ends: Ends, tmp_path: Path
) -> None:
    folder = stage.disturbed(tmp_path, victim)
    errors = [[error for *_, error in clients] for clients in visits(folder)]
    assert errors[0] == errors[2] == [None, None, None]
    assert errors[1][VICTIM] is not None
    assert state_of(folder) == ends["absent"]


@pytest.mark.parametrize("who", ["SuperLink", "server loop"])
def test_a_dead_process_at_the_server_changes_nothing(who: str, stage: Stage, ends: Ends, tmp_path: Path) -> None:
    def server_loop(local: Local) -> int | None:
        status = Status.read(tmp_path / "run")
        return status.pid if status is not None else None

    folder = stage.disturbed(tmp_path, hub if who == "SuperLink" else server_loop)
    assert [[error for *_, error in clients] for clients in visits(folder)] == [[None] * 3] * ROUNDS
    assert state_of(folder) == ends["undisturbed"]


def test_all_processes_end_with_the_one_that_started_them(stage: Stage, tmp_path: Path) -> None:
    stage.killed_command(tmp_path, 9)
