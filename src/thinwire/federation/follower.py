"""The server's side of whatever engine: a run begun as a job of the engine's, and seen through to its end."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from thinwire.config import ConfigError, Run, method_name
from thinwire.errors import Damaged
from thinwire.federation.keys import PUBLIC, check_server, removed_file
from thinwire.federation.processes import Children, alive, free_port
from thinwire.federation.server_app import Hub, Status, leave_file
from thinwire.federation.site_run import run_settings
from thinwire.records import read_records

TICK = 0.25  # seconds between two looks at the processes
BEGIN = 300.0  # seconds that an engine has to start the server's process
OLD = 20.0  # seconds that the loop of a command that was killed has to end
TRIES = 5  # jobs in a row that die within the same round


class Ended(RuntimeError):
    """The run did not come to its end; the message is the reason. `again`: it may well go on when started again."""

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class Follower(ABC):
    """An engine's processes at the server, with their files in `home`; they serve one run after another.

    `keys`: the folder that `thinwire keys` fills. `show` is given each command of the engine's that is run.
    """

    engine: str

    def __init__(
        self,
        home: Path,
        keys: Path,
        sites: Sequence[str],
        *,
        port: int | None = None,
        show: Callable[[Sequence[str]], None] = lambda command: None,
    ) -> None:
        self.home, self.keys, self.sites = home.resolve(), keys.resolve(), tuple(sites)
        self.port, self.show = port or free_port(), show
        for site in self.sites:
            path = self.keys / PUBLIC / f"{site}.pub"
            if not path.is_file() and not removed_file(self.keys, site).exists():
                raise ConfigError(f"{path}: missing; a site's key is registered by: thinwire keys register")
        if not (self.keys / "server.crt").is_file():
            raise ConfigError(f"{self.keys}: holds no certificate; make one with: thinwire keys server --host NAME")
        check_server(self.keys)
        self.children = Children(self.home / "flwr", self.home / "logs")
        self.paused = False

    @abstractmethod
    def start(self) -> None:
        """Start the engine and wait until it is well. Ended: it did not start."""

    @abstractmethod
    def submit(self, folder: Path) -> None:
        """Have the engine start the loop for a run's folder, in a process of its own."""

    @abstractmethod
    def tick(self) -> None:
        """Start what has died again."""

    @abstractmethod
    def why(self) -> str:
        """What the engine last reported of what starts the loop."""

    def refused(self) -> str | None:
        """Why the engine will not start the loop, None while it may."""
        return None

    def prepare(self, folder: Path, run: Run, splits: dict[str, str]) -> None:
        """Write what a run's processes need into its folder; `splits`: name -> file of rows that the server scores."""
        place = folder.resolve() / "federation"
        place.mkdir(parents=True, exist_ok=True)
        known = (place / "hub.json").exists()
        session = Hub.load(folder).session if known else secrets.token_hex(8)
        Hub(str(self.keys), session, self.sites, splits).write(folder)
        leave_file(folder).unlink(missing_ok=True)
        (place / "app").mkdir(exist_ok=True)
        (place / "app" / "site.json").write_text(run_settings(run, self.sites, session), encoding="utf-8")

    def leave(self, folder: Path) -> None:
        """Have the run end after the round that it is at: `follow` then raises Ended."""
        self.paused = False
        leave_file(folder).touch()

    def pause(self, folder: Path) -> None:
        """Have the loop end after the round that it is at, and go on in another job."""
        if not leave_file(folder).exists():
            self.paused = True
            leave_file(folder).touch()

    def begin(self, folder: Path) -> None:
        """Begin a job of the engine's: it goes on from the folder's checkpoint where there is one."""
        until = time.monotonic() + OLD
        # a loop of a command that was killed ends with it, a moment later: two must not write to one folder
        while at_work(folder) and time.monotonic() < until:
            time.sleep(TICK)
        (folder / "federation" / "status.json").unlink(missing_ok=True)
        if self.paused:
            self.paused = False
            leave_file(folder).unlink(missing_ok=True)
        self.submit(folder)

    def follow(self, folder: Path, tick: Callable[[], None] = lambda: None) -> None:
        """Begin the run and see it through; Ended where that fails. A dead engine or loop is started again."""
        tries, reached = 0, rounds_of(folder)
        while True:
            self.begin(folder)
            until = time.monotonic() + BEGIN
            while True:
                time.sleep(TICK)
                self.tick()
                tick()
                status = Status.read(folder)
                if status is None:
                    if (refused := self.refused()) is not None or time.monotonic() > until:
                        why = self.why() if refused is None else refused
                        raise Ended(f"{self.engine} did not start the server's process: {why}", again=True)
                elif status.state == "done":
                    return
                elif status.state == "stopped":
                    if self.paused:
                        break
                    raise Ended(status.error or "stopped", status.again)
                elif not alive(status.pid):
                    break
            ended = rounds_of(folder)
            tries, reached = (0, ended) if ended > reached else (tries + 1, reached)
            if tries == TRIES:
                raise Ended(f"the server's process died {TRIES} times in round {reached + 1}")

    def stop(self) -> None:
        """End all."""
        self.children.stop()


def at_work(folder: Path) -> bool:
    """Whether the server's loop is at work on a run, by its last word; what was not written here is none."""
    with suppress(Damaged):
        status = Status.read(folder)
        return status is not None and status.state == "running" and alive(status.pid)
    return False


def rounds_of(folder: Path) -> int:
    """The rounds of a run that have ended."""
    records = read_records(folder / "rounds.jsonl")
    return int(records[-1]["round"]) if records else 0


def federation_of(run: Run) -> tuple[str, ...]:
    """The sites that a run file names; ConfigError if it names none."""
    if run.federation is None or not run.federation.sites:
        raise ConfigError('federation.sites: missing; it names the run\'s clients, such as ["north", "south"]')
    return run.federation.sites


def check_model(run: Run, splits: Iterable[str]) -> None:
    """ConfigError where the server is to have no weights in memory, and the run has a use for them there."""
    if run.federation is None or run.federation.model:
        return
    where = "federation.model: without weights in memory the server"
    if run.method.needs_weights:
        raise ConfigError(f"{where} cannot do its part of {method_name(run.method)}, which needs them")
    if run.model.bits is not None:
        raise ConfigError(f"{where} cannot compare quantised ones with the sites': leave model.bits out")
    for name in splits:
        raise ConfigError(f"{where} can score no rows, such as those of {name}; see federation.evaluate")
    if run.data.public is not None or run.eval.prompts:
        raise ConfigError(f"{where} has no use for data.public and eval.prompts")
