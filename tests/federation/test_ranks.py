"""A site of two processes ends where one process does, and what happens where one of them fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from grid import OneProcess, entries, federate
from safetensors.torch import load_file
from silos import Silos, state_of
from tiny import tiny_rows, write_jsonl
from torch.testing import assert_close

from thinwire import assemble, wire
from thinwire.config import Run
from thinwire.federation import channel
from thinwire.federation.fingerprint import fingerprints
from thinwire.federation.local import OPEN
from thinwire.federation.processes import Children, alive, below
from thinwire.federation.site import Site
from thinwire.federation.site_run import run_settings
from thinwire.keys import Key
from thinwire.runtime import course
from thinwire.runtime.payloads import Hello
from thinwire.runtime.seats import Seats
from thinwire.wire import decode

FIRST_ORDER = {"lr": 1e-2, "steps": 2, "batch_size": 3}
THIN: dict[str, Any] = {"name": "fedkseed", "lr": 1e-3, "queries": 3, "steps": 3, "seeds": 32}
TIED = {"view": {"kind": "tied", "numbers": 128, "targets": ["q_proj", "v_proj"]}}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedkseed": (THIN, {}),
    "fedavg": ({"name": "fedavg", **FIRST_ORDER}, {}),
    "shards": ({"name": "fedavg", "moments": "kept", **FIRST_ORDER}, {"model": {"shards": True}}),
    "gradualdiff": ({"name": "gradualdiff", "optimiser": "sgd", **FIRST_ORDER}, {"model": {"shards": True}}),
    "onebit": ({"name": "onebit", "schedule": "constant", **FIRST_ORDER}, {"model": TIED}),
    "masked": ({"name": "fedavg", "weighting": "uniform", **FIRST_ORDER}, {"privacy": {"secure": {}}}),
}
WHERE = 1  # the client whose site has two processes


class Remote:
    """A worker in processes of its own, as an engine's client finds it: `answer` is Worker's."""

    def __init__(self, silos: Silos, folder: Path) -> None:
        self.folder, self.policy = folder, folder / "policy.toml"
        folder.mkdir()
        self.policy.write_text(OPEN)
        self.rows = folder / "rows.jsonl"
        self.rows.write_bytes((silos.folder / "data" / "south.jsonl").read_bytes())
        place = channel.folder(folder)
        parts = {"hold_out": False, "policy": str(self.policy), "allow_model": True, "processes": 2}
        self.site = Site("south", str(self.rows), str(folder / "site"), str(place / "worker"), **parts)
        self.site.write(folder / "site" / "site.json")
        self.children = Children(folder / "home", folder / "logs")

    def start(self) -> None:
        """Start the worker, which starts the other."""
        command = [sys.executable, "-m", "thinwire.federation.worker", self.folder / "site" / "site.json"]
        self.children.start("worker", command)

    @property
    def pid(self) -> int:
        return self.children.running["worker"].pid

    @property
    def other(self) -> int:
        """The process that is not the worker."""
        (found,) = [pid for pid, command in below(self.pid) if "thinwire.federation.ranks" in command]
        return found

    def answer(self, table: channel.Table, body: bytes) -> tuple[channel.Table, bytes]:
        """The worker's answer; one that has died is started again, and asked again."""
        asked = {key: value for key, value in table.items() if value is not None}
        if self.children.running["worker"].poll() is not None:
            self.start()
        try:
            return channel.ask(Path(self.site.socket), asked, body)
        except channel.Down:
            assert self.children.running["worker"].wait(60)
            self.start()
            return channel.ask(Path(self.site.socket), asked, body)

    def stop(self) -> None:
        self.children.stop()
        shutil.rmtree(Path(self.site.socket).parent)


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


@pytest.fixture(scope="module")
def south(silos: Silos, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    remote = Remote(silos, tmp_path_factory.mktemp("south") / "home")
    remote.start()
    try:
        yield remote
    finally:
        remote.stop()


def federated(silos: Silos, run: Run, folder: Path, south: Remote | None = None) -> tuple[course.Job, OneProcess]:
    job, grid, _ = federate(silos, run, folder)
    if south is not None:
        grid.workers[WHERE] = south  # type: ignore[call-overload]
    return job, grid


def errors(folder: Path) -> list[list[str | None]]:
    return [[visit.get("error") for visit in row["clients"]] for row in course.read_records(folder / "rounds.jsonl")]


@pytest.mark.parametrize("name", RUNS)
def test_a_site_of_two_processes_ends_where_one_does(name: str, silos: Silos, south: Remote, tmp_path: Path) -> None:
    method, fields = RUNS[name]
    run = silos.run(method, **{"name": name, **fields})
    pids: set[int] = set()
    for side, remote in (("one", None), ("two", south)):
        course.train(federated(silos, run, tmp_path / side, remote)[0])
        assert errors(tmp_path / side) == [[None] * 3] * 2
        pids |= {south.pid, south.other} if remote is not None else set()
    assert len(pids) == 2
    mine, theirs = (load_file(tmp_path / side / "model" / "model.safetensors") for side in ("one", "two"))
    for tensor, weights in mine.items():  # sums of gradients are rounded otherwise
        assert_close(theirs[tensor], weights, atol=2e-4, rtol=1e-3)
    assert set(mine) == set(theirs)
    if name == "fedkseed":  # each direction is asked about by one process alone, as it would be anyway
        assert state_of(tmp_path / "one") == state_of(tmp_path / "two")
        one, two = (entries(tmp_path / "one", "south"), [json.loads(line) for line in log(south).splitlines()])
        asked = [(line["bytes"], line["sha256"]) for line in one if line["action"] == "train"]
        assert asked == [(line["bytes"], line["sha256"]) for line in two if line["action"] == "train"][: len(asked)]


def log(south: Remote) -> str:
    return (south.folder / "site" / "audit.jsonl").read_text()


def test_where_a_process_dies_both_begin_again_and_nothing_is_lost(
    silos: Silos, south: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silos.run({**THIN, "seeds": 16}, rounds=3)
    job, grid = federated(silos, run, tmp_path / "one")
    course.train(job)
    job, grid = federated(silos, run, tmp_path / "two", south)
    before: set[int] = set()

    def killed(client: int, reply: Any) -> Any:
        record = tmp_path / "two" / "rounds.jsonl"
        if not before and record.exists() and record.read_text():
            before.update((south.pid, south.other))
            os.kill(south.other, signal.SIGKILL)
            until = time.monotonic() + 60
            while any(map(alive, before)):
                assert time.monotonic() < until
                time.sleep(0.1)
                south.children.running["worker"].poll()
        return reply

    grid.tamper = killed
    course.train(job)
    assert before
    assert not before & {south.pid, south.other}
    assert errors(tmp_path / "two") == [[None] * 3] * 3
    assert state_of(tmp_path / "one") == state_of(tmp_path / "two")
    notices = (south.folder / "site" / "notices.txt").read_text()
    assert "south: process 1 of 2 has failed: it has ended (-9)" in notices


def test_a_frame_that_cannot_be_used_costs_both_the_visit_alone(silos: Silos, south: Remote, tmp_path: Path) -> None:
    run = silos.run({"name": "fedavg", **FIRST_ORDER}, name="illegal")
    net = assemble.net_of(run)
    seats = Seats(Key.root(run.seed), run.rounds, net)
    down = run.method.broadcast(run.method.init(seats.server(0)), seats.server(1), WHERE, None)
    name = next(iter(down.weights))
    down = replace(down, weights={**down.weights, name: down.weights[name][:1]})
    frame = bytes(wire.encode(down, run=assemble.identity(run), round=1, client=WHERE))
    about = {"action": "train", "transfer": "5" * 16, "offset": 0, "total": len(frame), "room": 1 << 20, "counted": 0}
    settings = run_settings(run, ("north", "south", "west"), "0" * 16)
    pids = south.pid, south.other
    answer, _ = south.answer({**about, "settings": settings, **fingerprints(run, net)}, frame)
    assert answer["error"].startswith("Illegal: ")
    assert (south.pid, south.other) == pids
    with pytest.raises(wire.WireError):  # it is the client half that refuses it, at both, and not the reader
        run.method.client_update(decode(run.method.Down, wire.Frame(frame)), seats_of(silos, run).client(0, 1))


def seats_of(silos: Silos, run: Run) -> Seats:
    net = assemble.net_of(run)
    return Seats(Key.root(0), 1, net, data=assemble.clients_data(run, silos.rows(run), net))


def test_noise_of_each_process_is_refused(silos: Silos, south: Remote, tmp_path: Path) -> None:
    private = {"level": "record", "epsilon": 8.0, "delta": 1e-2}
    run = silos.run({**THIN, "queries": 1}, rounds=1, privacy=private, name="private")
    job, _ = federated(silos, run, tmp_path / "run", south)
    course.train(job)
    ((north, here, west),) = errors(tmp_path / "run")
    assert north is west is None
    assert here is not None
    assert here.endswith("each of this site's processes would draw noise of its own: it takes part with one alone")


def test_rows_that_changed_before_the_other_process_read_them(silos: Silos, south: Remote, tmp_path: Path) -> None:
    """The first has read them, the other cannot: both end; then neither can, and the site is out of the run."""
    run = silos.run(THIN, rounds=1, name="rows")
    job, grid = federated(silos, run, tmp_path / "run", south)
    pid, hello = south.pid, bytes(wire.encode(Hello(), run=assemble.identity(run), client=WHERE))
    about = {"action": "join", "transfer": "6" * 16, "offset": 0, "total": len(hello), "room": 1 << 20, "counted": 0}
    answer, _ = south.answer({**about, "settings": grid.settings, **fingerprints(run, assemble.net_of(run))}, hello)
    assert "error" not in answer
    south.rows.write_text("{broken\n")
    try:
        course.train(job)
    finally:
        write_jsonl(south.rows, tiny_rows(8, 2, closed=True))
    assert south.pid != pid
    ((north, here, west),) = errors(tmp_path / "run")
    assert north is west is None
    assert here is not None
    assert here.endswith("its own log says why")
    assert "south: process 1 of 2 has failed: " in (south.folder / "site" / "notices.txt").read_text()


def test_both_begin_a_visit_with_what_the_first_has_kept(silos: Silos, south: Remote, tmp_path: Path) -> None:
    """Moments that are gone from the site's disk are gone for both: their weights would part without a word."""
    method = {"name": "fedavg", "moments": "kept", **FIRST_ORDER}
    run = silos.run(method, rounds=3, name="gone")
    for side, remote in (("one", None), ("two", south)):
        job, grid = federated(silos, run, tmp_path / side, remote)
        place = tmp_path / side / "at" / "south" if remote is None else south.folder / "site"
        gone: list[Path] = []

        def lost(client: int, reply: Any, place: Path = place, gone: list[Path] = gone) -> Any:
            found = list(place.glob(f"runs/{assemble.identity(run):08x}-*/memory"))
            if client == WHERE and not gone and found:
                gone.extend(found)
                shutil.rmtree(found[0])
            return reply

        grid.tamper = lost
        course.train(job)
        assert len(gone) == 1
        assert errors(tmp_path / side) == [[None] * 3] * 3
    mine, theirs = (load_file(tmp_path / side / "model" / "model.safetensors") for side in ("one", "two"))
    for tensor, weights in mine.items():
        assert_close(theirs[tensor], weights, atol=2e-4, rtol=1e-3)


def test_a_version_that_is_lost_is_asked_for_again(silos: Silos, south: Remote, tmp_path: Path) -> None:
    method = {"name": "gradualdiff", "start": "shared", "optimiser": "sgd", **FIRST_ORDER}
    run = silos.run(method, rounds=3, name="stale")
    for side, remote in (("one", None), ("two", south)):
        job, grid = federated(silos, run, tmp_path / side, remote)
        place = tmp_path / side / "at" / "south" if remote is None else south.folder / "site"
        gone: list[Path] = []

        def lost(client: int, reply: Any, place: Path = place, gone: list[Path] = gone) -> Any:
            found = list(place.glob(f"runs/{assemble.identity(run):08x}-*/versions"))
            if client == WHERE and not gone and found:
                gone.extend(found)
                shutil.rmtree(found[0])
            return reply

        grid.tamper = lost
        course.train(job)
        assert len(gone) == 1
        assert errors(tmp_path / side) == [[None] * 3] * 3
    assert entries(tmp_path / "one", "south")
    lines = map(json.loads, log(south).splitlines())
    assert "Stale" in [line["kind"] for line in lines if line.get("run") == assemble.identity(run)]
    mine, theirs = (load_file(tmp_path / side / "model" / "model.safetensors") for side in ("one", "two"))
    for tensor, weights in mine.items():
        assert_close(theirs[tensor], weights, atol=2e-4, rtol=1e-3)
