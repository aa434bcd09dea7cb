"""Hub and sites under a supervisor, in network namespaces with delay, loss and partitions, killed in any order.

The run comes to its end without a person; what it ends with is what a run in one process ends with whose cohorts are
those whose replies counted. THINWIRE_SOAK_ROUNDS makes it longer or shorter.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from network import HUB, PORT, Network, lacking, network
from silos import Silos, in_process, state_of, visits

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from thinwire.federation import keys, proxy
from thinwire.federation.follower import rounds_of
from thinwire.federation.local import OPEN
from thinwire.federation.processes import alive, below
from thinwire.federation.server_app import Status
from thinwire.operations.drops import kind_of
from thinwire.operations.folders import holder

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(lacking() is not None, reason=lacking() or ""),
    pytest.mark.skipif(proxy.command(Path("/tmp")) is None, reason="neither nginx nor caddy is installed"),
]

ROUNDS = int(os.environ.get("THINWIRE_SOAK_ROUNDS", "200"))
EVERY = int(os.environ.get("THINWIRE_SOAK_EVERY", "2"))  # rounds between two troubles
MOST = 120.0 * ROUNDS  # seconds
SITES = ("north", "south", "west")
METHOD: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}
THINWIRE = [sys.executable, "-u", "-m", "thinwire.cli"]


@dataclass
class Service:
    """A command that is started again when it fails, as systemd does with Restart=on-failure."""

    command: list[str]
    log: Path
    ends: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    over: bool = False

    def start(self) -> Service:
        """Begin, in a thread of its own."""
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self) -> None:
        while not self.over:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
            self.ends.append(self.process.wait())
            if self.ends[-1] in (0, 2):  # what has ended well, or a person must mend
                return
            time.sleep(1)

    def stop(self) -> int:
        """Ask it to end; its exit status."""
        self.over = True
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@dataclass
class Stage:
    """All that is running, and what can befall it."""

    net: Network
    run: Path
    places: dict[str, Path]
    hub: Service
    sites: dict[str, Service]
    told: list[str] = field(default_factory=list)

    def troubles(self) -> dict[str, Callable[[str], int | None]]:
        """By name, what takes the site that is hit; the process to kill, None for what was done already."""
        return {
            "server": lambda site: self.hub.process.pid if self.hub.process else None,
            "hub": lambda site: self._of(self.hub, "flower-superlink"),
            "loop": lambda site: self._loop(),
            "client": lambda site: self.sites[site].process.pid,  # type: ignore[union-attr]
            "worker": lambda site: self._of(self.sites[site], "thinwire.federation.worker"),
            "node": lambda site: self._of(self.sites[site], "flower-supernode"),
            "partition": self._partition,
            "no network": lambda site: self._partition(*self.sites),
        }

    def hit(self, name: str, site: str) -> None:
        """Have it happen."""
        pid = self.troubles()[name](site)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        where = f" {site}" if name in ("client", "worker", "node", "partition") else ""
        self.told.append(f"round {rounds_of(self.run) + 1}: {name}{where}")

    def _of(self, service: Service, word: str) -> int | None:
        assert service.process is not None
        return next((pid for pid, command in below(service.process.pid) if word in command), None)

    def _loop(self) -> int | None:
        status = Status.read(self.run)
        return status.pid if status is not None and status.state == "running" and alive(status.pid) else None

    def _partition(self, *sites: str) -> None:
        for site in sites:
            self.net.cut(site, True)
        time.sleep(20)
        for site in sites:
            self.net.cut(site, False)


@contextmanager
def staged(silos: Silos, place: Path, sites: tuple[str, ...], toml: str) -> Iterator[Stage]:
    """Hub and sites under supervisors; all ended afterwards."""
    (place / "run.toml").write_text(toml)
    keys.make_server([HUB], place / "keys")
    places = {}
    for name in sites:
        places[name] = place / name
        places[name].mkdir()
        (places[name] / "policy.toml").write_text(OPEN)
        keys.register(name, keys.make_site(name, places[name]), place / "keys")
    with network(sites) as net:
        words = ["server", str(place / "run.toml"), "--keys", str(place / "keys"), "--listen", f"{HUB}:{PORT}"]
        command = net.within("hub", [*THINWIRE, *words, "--out", str(place / "run"), "--go-on", "--log", "json"])
        hub = Service(command, place / "hub.log").start()
        running: dict[str, Service] = {}
        try:
            for name in sites:
                at = places[name]
                words = ["client", "--server", net.server(), "--data", str(silos.folder / "data" / f"{name}.jsonl")]
                words += ["--key", str(at / f"{name}.key"), "--ca", str(place / "keys" / "ca.crt")]
                words += ["--model", str(silos.folder / "model"), "--policy", str(at / "policy.toml")]
                words += ["--folder", str(at / "site"), "--log", "json"]
                running[name] = Service(net.within(name, [*THINWIRE, *words]), at / "client.log").start()
            yield Stage(net, place / "run", places, hub, running)
        finally:
            for service in (*running.values(), hub):
                service.stop()


def lost(stage: Stage) -> Counter[str]:
    """Frames that were lost, by where: on their way down, at the site, or on their way up."""
    found: Counter[str] = Counter()
    logs = {
        name: [
            json.loads(line) for line in (place / "site" / "audit.jsonl").read_text().splitlines() if line[-1:] == "}"
        ]
        for name, place in stage.places.items()
    }
    for number, round in enumerate(visits(stage.run), 1):
        for id, _, _, error in round:
            if error is None:
                continue
            mine = [e for e in logs[SITES[id]] if e.get("round") == number and e.get("action") == "train"]
            passed = {e["direction"] for e in mine if e["verdict"] == "passed"}
            where = "its reply" if "out" in passed else "its visit" if "in" in passed else "the frame to it"
            found[f"{where} ({kind_of(str(error))})"] += 1
    return found


def asked_again(stage: Stage) -> list[dict[str, Any]]:
    """Frames of a round that a site has had before."""
    found, seen = [], set()
    for place in stage.places.values():
        for line in (place / "site" / "audit.jsonl").read_text().splitlines():
            entry = json.loads(line) if line.endswith("}") else {}
            if (entry.get("direction"), entry.get("action"), entry.get("verdict")) == ("in", "train", "passed"):
                if (at := (entry["round"], entry["client"])) in seen:
                    found.append(entry)
                seen.add(at)
    return found


def test_a_run_comes_to_its_end_whatever_is_killed_and_whenever_the_network_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silos = Silos.make(tmp_path)
    data = {"path": "the sites' own", "heldout": 0, "partition": "iid"}
    federation = {"sites": list(SITES), "deadline": 90.0, "patience": 10.0, "quorum": 1}
    run = silos.run(METHOD, ROUNDS, federation=federation, data=data, eval={"every": 0})
    draw, until = random.Random(1), time.monotonic() + MOST
    with staged(silos, tmp_path, SITES, run.to_toml()) as stage:
        names, reached = list(stage.troubles()), 0
        began = time.monotonic()
        while not stage.hub.ends or stage.hub.ends[-1] not in (0, 2):
            assert time.monotonic() < until, stage.told
            time.sleep(draw.uniform(0.2, 2))
            now = rounds_of(stage.run)
            if now >= reached + EVERY and now < ROUNDS - 1:
                reached = now
                if not names:
                    names = list(stage.troubles())
                stage.hit(names.pop(draw.randrange(len(names))), draw.choice(SITES))
        seconds = time.monotonic() - began
        assert stage.hub.ends[-1] == 0, (tmp_path / "hub.log").read_text()[-2000:]
        assert holder(stage.run) is None
        ends = {name: service.stop() for name, service in stage.sites.items()}
    found = visits(stage.run)
    counted = [[id for id, _, _, error in round if error is None] for round in found]
    cohort = [{"kind": "only", "clients": clients, "rounds": 1} for clients in counted]
    in_process(silos, silos.run(METHOD, ROUNDS, cohort=cohort, eval={"every": 0}), tmp_path / "alone", monkeypatch)
    asked = sum(map(len, found))
    begun = [json.loads(line) for line in (stage.run / "audit.jsonl").read_text().splitlines()]
    print(f"\n{ROUNDS} rounds in {seconds:.0f} s, {len(stage.told)} troubles: {'; '.join(stage.told)}")
    again = {(e["round"], e["client"]) for e in asked_again(stage)}
    anew = len({round for round, _ in again})
    starts = sum(event["event"] == "begin" for event in begun)
    print(f"rounds recorded {len(found)}, done again {anew}; the loop began {starts} times")
    print(f"the hub ended {stage.hub.ends}, the sites {[service.ends for service in stage.sites.values()]}")
    print(f"of {asked} frames down and as many up, lost: {sum(lost(stage).values())} {dict(lost(stage))}")
    print(f"sha256 {state_of(stage.run)[0]}, of the same cohorts in one process {state_of(tmp_path / 'alone')[0]}")
    assert len(found) == ROUNDS
    assert state_of(stage.run) == state_of(tmp_path / "alone")
    assert set(ends.values()) == {0}
