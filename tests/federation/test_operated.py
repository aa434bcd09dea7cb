"""A federation of real processes, operated: a site joins, one is removed, the hub is asked to end and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from silos import Silos, in_process, state_of, visits
from test_cli import thinwire

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from thinwire.federation import keys, proxy
from thinwire.federation.follower import rounds_of
from thinwire.federation.local import OPEN
from thinwire.federation.processes import free_port

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(proxy.command(Path("/tmp")) is None, reason="neither nginx nor caddy is installed"),
]

METHOD: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}
ROUNDS = 12
SECONDS = 900.0


def wait(what: Callable[[], bool], hub: subprocess.Popen[bytes], log: Path) -> None:
    """Until that is so."""
    until = time.monotonic() + SECONDS
    while not what():
        assert hub.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.3)


def cohorts(folder: Path) -> list[list[int]]:
    """Who was asked in each round."""
    return [[id for id, *_ in round] for round in visits(folder)]


def test_sites_join_and_leave_and_the_hub_ends_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silos, home, out, port = Silos.make(tmp_path), tmp_path / "keys", tmp_path / "run", free_port()
    data = {"path": "the sites' own", "heldout": 0, "partition": "iid"}
    federation = {"sites": ["north", "south"], "join": True, "deadline": 120.0, "quorum": 1, "patience": 60.0}
    run = silos.run(METHOD, ROUNDS, federation=federation, data=data, eval={"every": 0})
    (tmp_path / "run.toml").write_text(run.to_toml())
    keys.make_server([], home)
    publics = {name: keys.make_site(name, tmp_path / "at" / name) for name in ("north", "south", "west")}
    for name in ("north", "south"):
        keys.register(name, publics[name], home)
    log = tmp_path / "hub.log"
    words = [sys.executable, "-u", "-m", "thinwire.cli", "server", str(tmp_path / "run.toml"), "--keys", str(home)]
    words += ["--listen", f"127.0.0.1:{port}", "--out", str(out), "--go-on", "--log", "json"]
    running: list[subprocess.Popen[bytes]] = []

    def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            running.append(subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT))
        return running[-1]

    def join(name: str) -> subprocess.Popen[bytes]:
        at = tmp_path / "at" / name
        (at / "policy.toml").write_text(OPEN)
        site = [*words[:4], "client", "--server", f"127.0.0.1:{port}", "--ca", str(home / "ca.crt"), "--log", "json"]
        site += ["--data", str(silos.folder / "data" / f"{name}.jsonl"), "--model", str(silos.folder / "model")]
        site += ["--key", str(at / f"{name}.key"), "--policy", str(at / "policy.toml"), "--folder", str(at / "site")]
        return start(site, at / "client.log")

    try:
        hub = start(words, log)
        sites = {name: join(name) for name in ("north", "south")}
        wait(lambda: rounds_of(out) >= 1, hub, log)
        assert json.loads(thinwire("status", out, "--json").out)["state"] == "running"
        assert thinwire("keys", "register", "west", publics["west"], "--out", home).code == 0
        sites["west"] = join("west")
        wait(lambda: any(error is None for round in visits(out) for id, *_, error in round if id == 2), hub, log)
        assert thinwire("keys", "remove", "south", "--out", home).code == 0
        wait(lambda: cohorts(out)[-1] == [0, 2], hub, log)
        hub.send_signal(signal.SIGTERM)
        assert hub.wait(SECONDS) == 75
        last = json.loads(log.read_text().splitlines()[-1])
        assert (last["level"], last["event"]) == ("error", "stopped")
        assert f"asked to end, after round {rounds_of(out)} of {ROUNDS}; go on with: thinwire server" in last["message"]
        assert thinwire("status", out).code == 75
        assert start(words, log).wait(SECONDS) == 0
        for site in sites.values():
            site.send_signal(signal.SIGTERM)
        assert [site.wait(120) for site in sites.values()] == [0, 0, 0]
    finally:
        for process in reversed(running):
            if process.poll() is None:
                process.kill()
                process.wait()
    found = visits(out)
    assert [len(found), found[0][0][3], found[0][1][3]] == [ROUNDS, None, None]
    counted = [[id for id, _, _, error in round if error is None] for round in found]
    assert counted[-1] == [0, 2]
    cohort = [{"kind": "only", "clients": clients, "rounds": 1} for clients in counted]
    in_process(silos, silos.run(METHOD, ROUNDS, cohort=cohort, eval={"every": 0}), tmp_path / "alone", monkeypatch)
    assert state_of(out) == state_of(tmp_path / "alone")
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert {"round", "ended"} <= {event["event"] for event in events}
    frames = [json.loads(line) for line in (tmp_path / "at" / "west" / "client.log").read_text().splitlines()]
    assert {line["site"] for line in frames} == {None, "west"} or {line["site"] for line in frames} == {"west"}
    assert any(line["event"] == "frame" and line["round"] for line in frames)
