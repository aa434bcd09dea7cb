"""The server's side: Flower's SuperLink on loopback with its database, what runs apps beside it, and the run on it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import tomli_w

from thinwire import files
from thinwire.config import ConfigError, Run
from thinwire.federation.follower import Ended, Follower
from thinwire.federation.keys import PUBLIC, public_bytes
from thinwire.federation.processes import BIN, LEAN, wait_healthy
from thinwire.records import read_json

APP = Path(__file__).parent.parent / "flower_app"
CONNECTION = "hub"
LOOK = 2.0  # seconds between two looks at keys that could not be registered


class ServerSide(Follower):
    """Flower's processes at the server; see Follower. With `join` all who are registered there may connect."""

    engine = "Flower"

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
        super().__init__(home, keys, sites, port=port, show=show)
        self.join, self.looked = join, (0, 0.0)  # when the sites' keys were last seen to change, and were looked at
        self.host = host

    def prepare(self, folder: Path, run: Run, splits: dict[str, str]) -> None:
        """See Follower."""
        super().prepare(folder, run, splits)
        place = folder.resolve() / "federation" / "app"
        for file in (file for file in APP.iterdir() if file.is_file()):
            shutil.copyfile(file, place / file.name)

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

    def submit(self, folder: Path) -> None:
        """See Follower."""
        place = folder.resolve() / "federation"
        quoted = json.dumps(str(folder.resolve()), ensure_ascii=False)
        answer = self._flwr("run", place / "app", CONNECTION, "--run-config", f"folder={quoted}", "--format", "json")
        if (why := refusal(answer)) is not None:
            raise Ended(f"Flower did not start the run: {why}", again=True)

    def why(self) -> str:
        """See Follower."""
        return self.children.why("superexec")

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
