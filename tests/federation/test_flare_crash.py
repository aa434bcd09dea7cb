"""What a federation on NVIDIA FLARE survives: each test kills a process with signal 9; see test_crash.py for Flower's.

FLARE ends a job one of whose processes dies. The run then goes on as another job, from its last whole round.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from crashing import ROUNDS, VICTIM, Ends, Stage, Victim
from silos import in_process, local_of, state_of, visits

from thinwire.federation.follower import Ended, rounds_of
from thinwire.federation.local import Local
from thinwire.federation.processes import below
from thinwire.federation.server_app import Status

pytest.importorskip("nvflare", reason="comes with: pip install 'thinwire[nvflare]'")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage.make(tmp_path_factory.mktemp("silos"), "nvflare", 2, 60)


@pytest.fixture(scope="module")
def ends(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return stage.ends(tmp_path_factory.mktemp("ends"))


def of_site(local: Local, name: str) -> int:
    return local.sites[list(local.sites)[VICTIM]].children.running[name].pid


def node(local: Local) -> int | None:
    return of_site(local, "client")


def client_job(local: Local) -> int | None:
    return next(pid for pid, _ in below(of_site(local, "client")))


def worker(local: Local) -> int | None:
    return of_site(local, "worker")


def hub(local: Local) -> int | None:
    return local.server.children.running["server"].pid


def test_a_dead_worker_makes_its_site_absent_for_the_round(stage: Stage, ends: Ends, tmp_path: Path) -> None:
    folder = stage.disturbed(tmp_path, worker)
    errors = [[error for *_, error in clients] for clients in visits(folder)]
    assert errors[0] == errors[2] == [None, None]
    assert "worker died at work" in errors[1][VICTIM]
    assert state_of(folder) == ends["absent"]


@pytest.mark.parametrize("victim", [client_job, node, None, hub], ids=["job", "client", "server loop", "server"])
def test_a_dead_process_of_flare_s_costs_a_round_s_time_and_nothing_else(
    victim: Victim | None, stage: Stage, ends: Ends, tmp_path: Path
) -> None:
    def server_loop(local: Local) -> int | None:
        status = Status.read(tmp_path / "run")
        return status.pid if status is not None else None

    folder = stage.disturbed(tmp_path, victim or server_loop)
    assert [[error for *_, error in clients] for clients in visits(folder)] == [[None] * 2] * ROUNDS
    assert state_of(folder) == ends["undisturbed"]


def test_a_site_that_comes_later_takes_part_in_another_job(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silos, method, name = stage.silos, {**stage.method, "steps": 20}, stage.sites[VICTIM]
    run = silos.run(method, 12, federation={"patience": 3.0})
    local = local_of(silos, run, tmp_path / "hub", "nvflare")
    folder, others, late = tmp_path / "run", dict(local.sites), local.sites[name]
    del others[name]

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


def test_a_site_that_does_not_allow_our_classes_lets_no_job_of_ours_in(stage: Stage, tmp_path: Path) -> None:
    silos, name = stage.silos, stage.sites[VICTIM]
    run = silos.run(stage.method, ROUNDS)
    local = local_of(silos, run, tmp_path / "hub", "nvflare")
    try:
        local.server.start()
        kit = tmp_path / "hub" / "flare" / name / "local"
        (kit / "resources.json").write_bytes((kit / "resources.json.default").read_bytes())
        for site in local.sites.values():
            site.start()
        silos.begin(run, tmp_path / "run")
        with pytest.raises(Ended, match="FLARE did not start the server's process: its job is FINISHED:"):
            local.follow(tmp_path / "run", run, silos.rows(run).splits)
        log = tmp_path / "hub" / "at" / name / "logs" / "client.log"
        assert "is not in allow_list" in log.read_text()
    finally:
        local.stop()


def test_a_killed_command_leaves_no_process_behind_and_its_run_goes_on(
    stage: Stage, ends: Ends, tmp_path: Path
) -> None:
    # of each side its node and its job's, and the workers
    command = stage.killed_command(tmp_path, 2 * (1 + len(stage.sites)) + len(stage.sites))
    subprocess.run([*command, "--resume"], stdout=subprocess.DEVNULL, check=True, timeout=900)
    assert state_of(tmp_path / "out") == ends["undisturbed"]
