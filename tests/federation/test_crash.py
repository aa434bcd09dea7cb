"""What a federation survives: each test kills a process with signal 9, and the run goes on to a state that is known."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from silos import SITES, Silos, in_process, local_of, state_of, visits

from thinwire.config import Run
from thinwire.federation.follower import rounds_of
from thinwire.federation.local import Local
from thinwire.federation.processes import alive
from thinwire.federation.server_app import Status

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")
pytestmark = pytest.mark.long

ROUNDS = 3
HURT = 2  # the round in which it happens
VICTIM = 1  # the client to whom it happens
# Steps that take some seconds, so that a kill finds a client at work.
SLOW: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 200, "batch_size": 4}
Victim = Callable[[Local, Path], int | None]


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


@pytest.fixture(scope="module")
def ends(silos: Silos, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bytes]]:
    """The state of the run undisturbed, and of that in which the victim is absent for the round in which it is hurt."""
    others = [client for client in range(len(SITES)) if client != VICTIM]
    absent = [{"kind": "all", "rounds": HURT - 1}, {"kind": "only", "clients": others, "rounds": 1}, {"kind": "all"}]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, cohort in (("undisturbed", [{"kind": "all"}]), ("absent", absent)):
            folder = tmp_path_factory.mktemp("ends") / name
            in_process(silos, silos.run(SLOW, ROUNDS, cohort=cohort), folder, patch)
            found[name] = state_of(folder)
    assert found["undisturbed"] != found["absent"]
    return found


def disturbed(silos: Silos, tmp_path: Path, victim: Victim) -> Path:
    """The folder of a run on Flower during whose round HURT the process that `victim` names is killed."""
    run: Run = silos.run(SLOW, ROUNDS, federation={"deadline": 300.0, "patience": 200.0})
    local = local_of(silos, run, tmp_path / "hub")
    folder, killed = tmp_path / "run", 0

    def watch() -> None:
        nonlocal killed
        if not killed and rounds_of(folder) == HURT - 1 and (pid := victim(local, folder)) is not None:
            os.kill(pid, signal.SIGKILL)
            killed = pid

    try:
        local.start()
        silos.begin(run, folder)
        local.follow(folder, run, silos.rows(run).splits, watch)
    finally:
        local.stop()
    assert killed
    return folder


def below(pid: int) -> Iterator[tuple[int, str]]:
    """The processes that a process has started, and theirs: number and command."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if parent == pid:
            yield int(entry.name), command
            yield from below(int(entry.name))


def at_work(local: Local) -> bool:
    """Whether the victim's worker has taken in the frame of the round, and not answered yet."""
    lines = (local.place(SITES[VICTIM]) / "audit.jsonl").read_text().splitlines()
    return f'"round": {HURT}' in lines[-1] and '"direction": "in"' in lines[-1]


def client_app(local: Local, folder: Path) -> int | None:
    node = local.sites[SITES[VICTIM]].children.running["supernode"].pid
    return next((pid for pid, command in below(node) if "flwr-clientapp" in command and at_work(local)), None)


def worker(local: Local, folder: Path) -> int | None:
    return local.sites[SITES[VICTIM]].children.running["worker"].pid if at_work(local) else None


def node(local: Local, folder: Path) -> int | None:
    return local.sites[SITES[VICTIM]].children.running["supernode"].pid if at_work(local) else None


def hub(local: Local, folder: Path) -> int | None:
    return local.server.children.running["superlink"].pid if at_work(local) else None


def server_loop(local: Local, folder: Path) -> int | None:
    status = Status.read(folder)
    return status.pid if status is not None and at_work(local) else None


@pytest.mark.parametrize("victim", [client_app, worker, node], ids=["ClientApp", "worker", "SuperNode"])
def test_a_dead_process_at_a_site_makes_it_absent_for_the_round(
    victim: Victim, silos: Silos, ends: dict[str, tuple[str, bytes]], tmp_path: Path
) -> None:
    folder = disturbed(silos, tmp_path, victim)
    errors = [[error for *_, error in clients] for clients in visits(folder)]
    assert errors[0] == errors[2] == [None, None, None]
    assert errors[1][VICTIM] is not None
    assert state_of(folder) == ends["absent"]


@pytest.mark.parametrize("victim", [hub, server_loop], ids=["SuperLink", "server loop"])
def test_a_dead_process_at_the_server_changes_nothing(
    victim: Victim, silos: Silos, ends: dict[str, tuple[str, bytes]], tmp_path: Path
) -> None:
    folder = disturbed(silos, tmp_path, victim)
    assert [[error for *_, error in clients] for clients in visits(folder)] == [[None] * 3] * ROUNDS
    assert state_of(folder) == ends["undisturbed"]


def test_all_processes_end_with_the_one_that_started_them(silos: Silos, tmp_path: Path) -> None:
    import subprocess
    import sys

    run = silos.run(SLOW, ROUNDS)
    (tmp_path / "run.toml").write_text(run.to_toml())
    command = [sys.executable, "-m", "thinwire.cli", "local-federation", str(tmp_path / "run.toml")]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 900
    try:
        while rounds_of(tmp_path / "out") < 1:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.5)
        children = [pid for pid, _ in below(process.pid)]
        assert len(children) > 8
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    while left := [pid for pid in children if alive(pid)]:
        assert time.monotonic() < until + 60, left
        time.sleep(0.5)
