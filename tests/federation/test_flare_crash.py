"""What a federation on NVIDIA FLARE survives: each test kills a process with signal 9; see test_crash.py for Flower's.

FLARE ends a job one of whose processes dies. The run then goes on as another job, from its last whole round.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from silos import Silos, in_process, local_of, state_of, visits

from thinwire.federation.follower import Ended, rounds_of
from thinwire.federation.local import Local
from thinwire.federation.processes import alive, below
from thinwire.federation.server_app import Status

pytest.importorskip("nvflare", reason="comes with: pip install 'thinwire[nvflare]'")
pytestmark = pytest.mark.long

SITES = ("north", "south")
ROUNDS = 3
HURT = 2  # the round in which it happens
VICTIM = 1  # the client to whom it happens
# Steps that take some seconds, so that a kill finds a client at work.
SLOW: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 60, "batch_size": 4}
Victim = Callable[[Local, Path], int | None]


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"), len(SITES))


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
    """The folder of a run on FLARE during whose round HURT the process that `victim` names is killed."""
    run = silos.run(SLOW, ROUNDS, federation={"deadline": 300.0, "patience": 200.0})
    local = local_of(silos, run, tmp_path / "hub", "nvflare")
    folder, killed, began = tmp_path / "run", 0, time.monotonic()

    def watch() -> None:
        nonlocal killed
        if not killed and rounds_of(folder) == HURT - 1 and at_work(local) and (pid := victim(local, folder)):
            os.kill(pid, signal.SIGKILL)
            killed = pid
            print(f"{time.monotonic() - began:.0f} s: killed {pid}")  # noqa: T201

    try:
        local.start()
        silos.begin(run, folder)
        local.follow(folder, run, silos.rows(run).splits, watch)
        print(f"{time.monotonic() - began:.0f} s: done")  # noqa: T201
    finally:
        local.stop()
    assert killed
    return folder


def at_work(local: Local) -> bool:
    """Whether the victim's worker has taken in the frame of the round, and not answered yet."""
    lines = (local.place(SITES[VICTIM]) / "audit.jsonl").read_text().splitlines()
    return f'"round": {HURT}' in lines[-1] and '"direction": "in"' in lines[-1]


def node(local: Local, folder: Path) -> int | None:
    return local.sites[SITES[VICTIM]].children.running["client"].pid


def client_job(local: Local, folder: Path) -> int | None:
    return next(pid for pid, _ in below(local.sites[SITES[VICTIM]].children.running["client"].pid))


def worker(local: Local, folder: Path) -> int | None:
    return local.sites[SITES[VICTIM]].children.running["worker"].pid


def hub(local: Local, folder: Path) -> int | None:
    return local.server.children.running["server"].pid


def server_loop(local: Local, folder: Path) -> int | None:
    status = Status.read(folder)
    return status.pid if status is not None else None


def test_a_dead_worker_makes_its_site_absent_for_the_round(
    silos: Silos, ends: dict[str, tuple[str, bytes]], tmp_path: Path
) -> None:
    folder = disturbed(silos, tmp_path, worker)
    errors = [[error for *_, error in clients] for clients in visits(folder)]
    assert errors[0] == errors[2] == [None, None]
    assert "worker died at work" in errors[1][VICTIM]
    assert state_of(folder) == ends["absent"]


@pytest.mark.parametrize("victim", [client_job, node, server_loop, hub])
def test_a_dead_process_of_flare_s_costs_a_round_s_time_and_nothing_else(
    victim: Victim, silos: Silos, ends: dict[str, tuple[str, bytes]], tmp_path: Path
) -> None:
    folder = disturbed(silos, tmp_path, victim)
    assert [[error for *_, error in clients] for clients in visits(folder)] == [[None] * 2] * ROUNDS
    assert state_of(folder) == ends["undisturbed"]


def test_a_site_that_comes_later_takes_part_in_another_job(
    silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {**SLOW, "steps": 20}
    run = silos.run(method, 12, federation={"patience": 3.0})
    local = local_of(silos, run, tmp_path / "hub", "nvflare")
    folder, others, late = tmp_path / "run", dict(local.sites), local.sites[SITES[VICTIM]]
    del others[SITES[VICTIM]]

    def watch() -> None:
        if not late.children.running and rounds_of(folder) >= 1:
            late.start()

    try:
        with monkeypatch.context() as patch:
            patch.setattr(local, "sites", others)
            local.start()
            silos.begin(run, folder)
            local.follow(folder, run, silos.rows(run).splits, watch)
    finally:
        local.stop()
    came = [clients[VICTIM][3] for clients in visits(folder)]
    without = came.index(None)
    assert 1 <= without < len(came)
    assert came == ["not connected"] * without + [None] * (len(came) - without)
    cohort = [{"kind": "only", "clients": [0], "rounds": without}, {"kind": "all"}]
    in_process(silos, silos.run(method, 12, cohort=cohort), tmp_path / "x", monkeypatch)
    assert state_of(folder) == state_of(tmp_path / "x")


def test_a_site_that_does_not_allow_our_classes_lets_no_job_of_ours_in(silos: Silos, tmp_path: Path) -> None:
    run = silos.run(SLOW, ROUNDS)
    local = local_of(silos, run, tmp_path / "hub", "nvflare")
    try:
        local.server.start()
        kit = tmp_path / "hub" / "flare" / SITES[VICTIM] / "local"
        (kit / "resources.json").write_bytes((kit / "resources.json.default").read_bytes())
        for site in local.sites.values():
            site.start()
        silos.begin(run, tmp_path / "run")
        with pytest.raises(Ended, match="FLARE did not start the server's process: its job is FINISHED:"):
            local.follow(tmp_path / "run", run, silos.rows(run).splits)
        log = tmp_path / "hub" / "at" / SITES[VICTIM] / "logs" / "client.log"
        assert "is not in allow_list" in log.read_text()
    finally:
        local.stop()


def test_a_killed_command_leaves_no_process_behind_and_its_run_goes_on(
    silos: Silos, ends: dict[str, tuple[str, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(silos.run(SLOW, ROUNDS).to_toml())
    command = [sys.executable, "-m", "thinwire.cli", "local-federation", str(tmp_path / "run.toml")]
    command += ["--engine", "nvflare", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 900
    try:
        while rounds_of(tmp_path / "out") < 1:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.5)
        children = [pid for pid, _ in below(process.pid)]
        assert len(children) >= 2 * (1 + len(SITES)) + len(SITES)  # of each side its node and its job's, and workers
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    while left := [pid for pid in children if alive(pid)]:
        assert time.monotonic() < until + 60, left
        time.sleep(0.5)
    subprocess.run([*command, "--resume"], stdout=subprocess.DEVNULL, check=True, timeout=900)
    assert state_of(tmp_path / "out") == ends["undisturbed"]
