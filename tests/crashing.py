"""A federation of which a process is killed with signal 9 in a known round, on either engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from silos import SITES, Silos, in_process, local_of, state_of

from thinwire.federation.follower import rounds_of
from thinwire.federation.local import Local
from thinwire.federation.processes import alive, below

ROUNDS = 3
HURT = 2  # the round in which it happens
VICTIM = 1  # the client to whom it happens
Ends = dict[str, tuple[str, bytes]]
Victim = Callable[[Local], int | None]


@dataclass(frozen=True)
class Stage:
    """Some sites on an engine, and steps that take some seconds, so that a kill finds a client at work."""

    silos: Silos
    engine: str
    sites: tuple[str, ...]
    steps: int

    @classmethod
    def make(cls, folder: Path, engine: str, sites: int, steps: int) -> Stage:
        """With rows and a model of its own."""
        return cls(Silos.make(folder, sites), engine, SITES[:sites], steps)

    @property
    def method(self) -> dict[str, Any]:
        """What is trained."""
        return {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": self.steps, "batch_size": 4}

    def ends(self, folder: Path) -> Ends:
        """The state of the run `undisturbed`, and of that in which the victim is `absent` for the round that hurts."""
        others = [client for client in range(len(self.sites)) if client != VICTIM]
        hurt = [{"kind": "all", "rounds": HURT - 1}, {"kind": "only", "clients": others, "rounds": 1}, {"kind": "all"}]
        found = {}
        with pytest.MonkeyPatch.context() as patch:
            for name, cohort in (("undisturbed", [{"kind": "all"}]), ("absent", hurt)):
                in_process(self.silos, self.silos.run(self.method, ROUNDS, cohort=cohort), folder / name, patch)
                found[name] = state_of(folder / name)
        assert found["undisturbed"] != found["absent"]
        return found

    def at_work(self, local: Local) -> bool:
        """Whether the victim's worker has taken in the frame of the round, and not answered yet."""
        lines = (local.place(self.sites[VICTIM]) / "audit.jsonl").read_text().splitlines()
        return f'"round": {HURT}' in lines[-1] and '"direction": "in"' in lines[-1]

    def disturbed(self, folder: Path, victim: Victim) -> Path:
        """The folder of a run during whose round HURT the process that `victim` names is killed."""
        run = self.silos.run(self.method, ROUNDS, federation={"deadline": 300.0, "patience": 200.0})
        local = local_of(self.silos, run, folder / "hub", self.engine)
        out, killed = folder / "run", 0

        def watch() -> None:
            nonlocal killed
            if not killed and rounds_of(out) == HURT - 1 and self.at_work(local) and (pid := victim(local)):
                os.kill(pid, signal.SIGKILL)
                killed = pid

        try:
            local.start()
            self.silos.begin(run, out)
            local.follow(out, run, self.silos.rows(run).splits, watch)
        finally:
            local.stop()
        assert killed
        return out

    def killed_command(self, folder: Path, least: int) -> list[str]:
        """Kill the command itself after round 1: of at least so many processes none is left; the command's words."""
        (folder / "run.toml").write_text(self.silos.run(self.method, ROUNDS).to_toml())
        command = [sys.executable, "-m", "thinwire.cli", "local-federation", str(folder / "run.toml")]
        command += ["--engine", self.engine, "--out", str(folder / "out")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 900
        try:
            while rounds_of(folder / "out") < 1:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.5)
            children = [pid for pid, _ in below(process.pid)]
            assert len(children) >= least
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        while left := [pid for pid in children if alive(pid)]:
            assert time.monotonic() < until + 60, left
            time.sleep(0.5)
        return command
