"""The server's side on FLARE: its server's process on loopback, and a job whenever a run is begun or gone on with."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from thinwire.config import Federation, Run
from thinwire.federation.flare import kits
from thinwire.federation.flare.engine import CALLS
from thinwire.federation.follower import Ended, Follower
from thinwire.federation.processes import COMMAND, LEAN, Children, below

SYNC = 300  # seconds that a site's process has to start for a job
THREADS = 100  # of calls at a time, as FLARE has it, where sites are few
LOOK = 10.0  # seconds between two questions after a job whose loop has not begun, and after absent sites


class FlareServer(Follower):
    """FLARE's server with its kits in `home`; see Follower."""

    engine = "FLARE"

    def __init__(self, home: Path, keys: Path, sites: Sequence[str], **options: Any) -> None:
        kits.check_names(sites)
        super().__init__(home, keys, sites, **options)
        self.kits = self.home / "flare"
        self.federation = Federation()
        self.folder, self.job, self.looked = self.home, "", 0.0
        self.absent: set[str] = set()  # sites that the job began without: they cannot come into it

    def prepare(self, folder: Path, run: Run, splits: dict[str, str]) -> None:
        """See Follower."""
        super().prepare(folder, run, splits)
        self.federation = run.federation or Federation()

    def start(self) -> None:
        """See Follower; the kits are made anew, for the port is another."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)
        kits.make(self.kits, self.sites, self.port)
        self._server()

    def submit(self, folder: Path) -> None:
        """See Follower."""
        job = self.kits / "job"
        _write_job(job, folder.resolve(), self.sites, min(self.federation.quorum, len(self.sites)))
        fewest, patience = f"{self.federation.quorum}", self.federation.patience
        answer = self._admin("submit", job, fewest, f"{patience:g}", *self.sites, seconds=COMMAND + patience)
        self.job, *absent = answer.split()
        self.folder, self.absent, self.looked = folder, set(absent), time.monotonic()

    def tick(self) -> None:
        """See Follower. Where a site has come that the job is without, the run goes on in another."""
        if self.children.running["server"].poll() is not None:
            self._server()
        if self.absent and time.monotonic() > self.looked + LOOK:
            with suppress(Ended):
                if self.absent & set(self._admin("clients").split()):
                    self.pause(self.folder)
                    self.absent = set()
            self.looked = time.monotonic()

    def why(self) -> str:
        """See Follower."""
        return self.children.why("server")

    def refused(self) -> str | None:
        """See Follower."""
        if time.monotonic() < self.looked + LOOK:
            return None
        status = self._admin("status", self.job)
        self.looked = time.monotonic()
        ended = status.startswith("FINISHED")  # FLARE leaves the reason where it arose
        return f"its job is {status}; the server's log, or a site's client.log, has why" if ended else None

    def stop(self) -> None:
        """See Follower."""
        end_jobs(self.children, "server")
        super().stop()

    def _server(self) -> None:
        kit = self.kits / kits.HOST
        command = process("server", kit, kits.HOST)
        self.show(command)
        self.children.start("server", command, **LEAN)

    def _admin(self, *words: str | Path, seconds: float = COMMAND) -> str:
        command = [sys.executable, "-m", "thinwire.federation.flare.admin", self.kits / kits.ADMIN, *words]
        self.show([str(word) for word in command])
        try:
            return self.children.call(command, seconds).strip()
        except RuntimeError as error:
            raise Ended(str(error), again=True) from None


def process(kind: str, kit: Path, name: str) -> list[str]:
    """The command that starts FLARE's server or client with a kit."""
    named = [] if kind == "server" else [f"uid={name}"]
    settings = ["secure_train=true", *named, f"org={kits.PROJECT}", "config_folder=config"]
    main = f"nvflare.private.fed.app.{kind}.{kind}_train"
    return [sys.executable, "-u", "-m", main, "-m", str(kit), "-s", f"fed_{kind}.json", "--set", *settings]


def end_jobs(children: Children, name: str) -> None:
    """End the processes that FLARE's has started for jobs: they lead sessions of their own."""
    for job, _ in below(children.running[name].pid) if name in children.running else ():
        with suppress(ProcessLookupError):
            os.kill(job, signal.SIGKILL)


def _write_job(place: Path, folder: Path, sites: Sequence[str], fewest: int) -> None:
    """A job of FLARE's for the run in a folder: classes and what they are made with, no code."""
    settings = (folder / "federation" / "app" / "site.json").read_bytes().hex()
    threads = max(THREADS, CALLS * len(sites))
    controller = {"server_obj_id": "_server", "sync_task_timeout": SYNC, "max_call_threads": threads}
    app, runtime = "thinwire.federation.flare.app", "nvflare.collab.runtime"
    server = {
        "format_version": 2,
        "workflows": [{"id": "controller", "path": f"{runtime}.controller.CollabController", "args": controller}],
        "components": [{"id": "_server", "path": f"{app}.Loop", "args": {"folder": str(folder), "place": os.getcwd()}}],
    }
    executor = {"path": f"{runtime}.executor.CollabExecutor", "args": {"client_obj_id": "_client"}}
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": executor}],
        "components": [{"id": "_client", "path": f"{app}.Relay", "args": {"settings": settings}}],
    }
    deploy = {"app": ["server", *sites]}
    meta = {"name": kits.PROJECT, "resource_spec": {}, "min_clients": fewest, "deploy_map": deploy}
    (place / "app" / "config").mkdir(parents=True, exist_ok=True)
    (place / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    for name, table in (("server", server), ("client", client)):
        (place / "app" / "config" / f"config_fed_{name}.json").write_text(json.dumps(table), encoding="utf-8")
