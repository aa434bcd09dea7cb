"""A whole federation on this machine's loopback: the server's side, a site for each client, keys for all of them."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from thinwire.build import Rows
from thinwire.config import ConfigError, Run
from thinwire.data.load import Row
from thinwire.federation import keys
from thinwire.federation.hub import ServerSide
from thinwire.federation.site import SiteSide
from thinwire.federation.worker import Site


class Local:
    """Server and sites in a run's folder. `say` is given lines for people."""

    def __init__(self, run: Run, rows: Rows, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.say, self.home = say, folder.resolve() / "federation"
        self.names = site_names(run, list(rows.clients))
        secrets, splits = self.home / "keys", {}
        if not (secrets / "server.crt").exists():
            keys.make_server([], secrets)
        for name, held in rows.splits.items():
            splits[name] = str(_write(self.home / "splits" / f"{name}.jsonl", held))
        for name, held in zip(self.names, rows.clients.values(), strict=True):
            place = self.home / "at" / name
            _write(place / "data.jsonl", held)
            if not (place / f"{name}.key").exists():
                keys.register(name, keys.make_site(name, place), secrets)
        self.server = ServerSide(folder, secrets, run, self.names, splits)
        self.sites: dict[str, SiteSide] = {}
        for name in self.names:
            place = self.home / "at" / name
            site = Site(name, str(place / "data.jsonl"), str(place), "", hold_out=False)
            address = f"127.0.0.1:{self.server.port}"
            self.sites[name] = SiteSide(site, address, place / f"{name}.key", self.server.ca)

    def start(self) -> None:
        """Start the server's side, then the sites."""
        self.server.start()
        for site in self.sites.values():
            site.start()

    def follow(self, watch: Callable[[Local], None] = lambda local: None) -> None:
        """Run to the end, looking after all processes; hub.Ended where it does not come to its end."""

        def tick() -> None:
            for site in self.sites.values():
                if (line := site.tick()) is not None:
                    self.say(line)
            watch(self)

        self.server.follow(tick)

    def kill(self, name: str) -> None:
        """Kill a site's node, as a machine that fails would: the site comes back by itself."""
        os.kill(self.sites[name].children.running["supernode"].pid, signal.SIGKILL)

    def stop(self) -> None:
        """End all."""
        for site in self.sites.values():
            site.stop()
        self.server.stop()


def site_names(run: Run, clients: list[str]) -> tuple[str, ...]:
    """The names of the sites: the run file's, else the clients' where they are names for sites, else site-N."""
    if run.federation is not None and run.federation.sites:
        if len(run.federation.sites) != len(clients):
            raise ConfigError(f"federation.sites: names {len(run.federation.sites)} sites for {len(clients)} clients")
        return run.federation.sites
    if all(re.fullmatch(keys.NAME, name) for name in clients):
        return tuple(clients)
    return tuple(f"site-{number}" for number in range(1, len(clients) + 1))


def _write(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(row.fields)) + "\n")
    return path
