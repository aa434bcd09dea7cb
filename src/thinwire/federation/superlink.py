"""The server's side: Flower's SuperLink on loopback with its database, what runs apps beside it, and the run on it."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import tomli_w

from thinwire import files
from thinwire.config import ConfigError, Run, method_name
from thinwire.errors import Damaged
from thinwire.federation.keys import PUBLIC, check_server, public_bytes, removed_file
from thinwire.federation.processes import BIN, LEAN, Children, alive, free_port, wait_healthy
from thinwire.federation.server_app import Hub, Status, leave_file
from thinwire.federation.site_run import run_settings
from thinwire.records import read_json, read_records

APP = Path(__file__).parent.parent / "flower_app"
CONNECTION = "hub"
LOOK = 2.0  # seconds between two looks at keys that could not be registered
TICK = 0.25  # seconds between two looks at the processes
BEGIN = 300.0  # seconds that Flower has to start the server's process
OLD = 20.0  # seconds that the loop of a command that was killed has to end
TRIES = 5  # Flower runs in a row that die within the same round


class Ended(RuntimeError):
    """The run did not come to its end; the message is the reason. `again`: it may well go on when started again."""

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class ServerSide:
    """Flower's processes at the server, with their files in `home`; they serve one run after another.

    `keys`: the folder that `thinwire keys` fills; with `join` all who are registered there may connect. `show` is given
    each Flower command that is run.
    """

    def __init__(
        self,
        home: Path,
        keys: Path,
        sites: Sequence[str],
        *,
        join: bool = False,
        host: str = "127.0.0.1",
        port: int | None = None,
        show: Callable[[Sequence[str]], None] = lambda command: None,
    ) -> None:
        self.home, self.keys, self.sites = home.resolve(), keys.resolve(), tuple(sites)
        self.join, self.looked = join, (0, 0.0)  # when the sites' keys were last seen to change, and were looked at
        self.host, self.port, self.show = host, port or free_port(), show
        for site in self.sites:
            path = self.keys / PUBLIC / f"{site}.pub"
            if not path.is_file() and not removed_file(self.keys, site).exists():
                raise ConfigError(f"{path}: missing; a site's key is registered by: thinwire keys register")
        if not (self.keys / "server.crt").is_file():
            raise ConfigError(f"{self.keys}: holds no certificate; make one with: thinwire keys server --host NAME")
        check_server(self.keys)
        self.children = Children(self.home / "flwr", self.home / "logs")

    def prepare(self, folder: Path, run: Run, splits: dict[str, str]) -> None:
        """Write what a run's processes need into its folder; `splits`: name -> file of rows that the server scores."""
        place = folder.resolve() / "federation"
        place.mkdir(parents=True, exist_ok=True)
        known = (place / "hub.json").exists()
        session = Hub.load(folder).session if known else secrets.token_hex(8)
        Hub(str(self.keys), session, self.sites, splits).write(folder)
        leave_file(folder).unlink(missing_ok=True)
        (place / "app").mkdir(exist_ok=True)
        for file in (file for file in APP.iterdir() if file.is_file()):
            shutil.copyfile(file, place / "app" / file.name)
        (place / "app" / "site.json").write_text(run_settings(run, self.sites, session), encoding="utf-8")

    @property
    def ca(self) -> Path:
        """The certificate authority's certificate."""
        return self.keys / "ca.crt"

    def start(self) -> None:
        """Start the hub and wait until it is well, then register the sites' keys. Ended: it did not start."""
        flwr = self.home / "flwr"
        flwr.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)  # made by an older thinwire, perhaps
        address = f"127.0.0.1:{self.port}"
        connection = {"address": address, "root-certificates": str(self.ca)}
        (flwr / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))
        self._superlink()
        self._superexec()
        self._register()

    def leave(self, folder: Path) -> None:
        """Have the run end after the round that it is at: `follow` then raises Ended."""
        leave_file(folder).touch()

    def begin(self, folder: Path) -> None:
        """Begin a Flower run of the app: it goes on from the folder's checkpoint where there is one."""
        place, until = folder.resolve() / "federation", time.monotonic() + OLD
        # a loop of a command that was killed ends with it, a moment later: two must not write to one folder
        while at_work(folder) and time.monotonic() < until:
            time.sleep(TICK)
        (place / "status.json").unlink(missing_ok=True)
        quoted = json.dumps(str(folder.resolve()), ensure_ascii=False)
        answer = self._flwr("run", place / "app", CONNECTION, "--run-config", f"folder={quoted}", "--format", "json")
        if (why := refusal(answer)) is not None:
            raise Ended(f"Flower did not start the run: {why}", again=True)

    def follow(self, folder: Path, tick: Callable[[], None] = lambda: None) -> None:
        """Begin the run and see it through; Ended where that fails. A dead hub or loop is started again."""
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
                    if time.monotonic() > until:
                        why = self.children.why("superexec")
                        raise Ended(f"Flower did not start the server's process: {why}", again=True)
                elif status.state == "done":
                    return
                elif status.state == "stopped":
                    raise Ended(status.error or "stopped", status.again)
                elif not alive(status.pid):
                    break
            ended = rounds_of(folder)
            tries, reached = (0, ended) if ended > reached else (tries + 1, reached)
            if tries == TRIES:
                raise Ended(f"the server's process died {TRIES} times in round {reached + 1}")

    def tick(self) -> None:
        """Start what has died again: the hub on its database, so that a run goes on."""
        for name, start in (("superlink", self._superlink), ("superexec", self._superexec)):
            if self.children.running[name].poll() is not None:
                start()
        changed, looked = self.looked
        now = (self.keys / PUBLIC).stat().st_mtime_ns
        if now != changed and time.monotonic() > looked + LOOK:
            with suppress(Ended, ConfigError):  # the hub may be busy, a file half there: it is tried again
                self._register()

    def _register(self) -> None:
        """Make the sites' keys known to the hub, those that it does not know yet."""
        place, known = self.keys / PUBLIC, self.home / "registered.json"
        now = place.stat().st_mtime_ns
        self.looked = (self.looked[0], time.monotonic())
        registered = read_json(dict[str, str], known) if known.exists() else {}
        names = sorted(path.stem for path in place.glob("*.pub")) if self.join else self.sites
        for site in (name for name in names if (place / f"{name}.pub").exists()):
            key = place / f"{site}.pub"
            if registered.get(site) != public_bytes(key).decode():
                self._flwr("supernode", "register", key, CONNECTION, "--name", site)
                registered[site] = public_bytes(key).decode()
                files.write(known, json.dumps(registered))
        self.looked = (now, time.monotonic())

    def stop(self) -> None:
        """End all."""
        self.children.stop()

    def _superlink(self) -> None:
        command: list[str | Path] = [
            BIN / "flower-superlink",
            *("--ssl-ca-certfile", self.ca),
            *("--ssl-certfile", self.keys / "server.crt"),
            *("--ssl-keyfile", self.keys / "server.key"),
            "--enable-supernode-auth",
            *("--isolation", "process"),
            *("--database", self.home / "superlink.db"),
            *("--host", self.host),
            *("--port", str(self.port)),
            "--disable-runtime-dependency-installation",
        ]
        self.show([str(part) for part in command])
        process = self.children.start("superlink", command, **LEAN)
        if (wrong := wait_healthy(process, self.port, self.ca)) is not None:
            raise Ended(f"the hub did not start: {wrong or self.children.why('superlink')}", again=not wrong)

    def _superexec(self) -> None:
        command = [
            str(BIN / "flower-superexec"),
            *("--runtime-api-address", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.ca)),
        ]
        self.show(command)
        self.children.start("superexec", command, **LEAN)

    def _flwr(self, *args: str | Path) -> str:
        command = [str(BIN / "flwr"), *map(str, args)]
        self.show(command)
        try:
            return self.children.call(command)
        except RuntimeError as error:
            raise Ended(str(error), again=True) from None


def refusal(answer: str) -> str | None:
    """Why Flower's command has not done what it was asked for, where its JSON says so: its exit status may be 0."""
    try:
        found = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])
    except ValueError:
        return None
    return str(found.get("error-message") or "no reason given") if found.get("success") is False else None


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
