"""A whole federation on this machine's loopback: the server's side, a site for each client, keys for all of them."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.config import ConfigError, Run
from thinwire.data.rows import Row
from thinwire.federation import keys
from thinwire.federation.attended import Attended
from thinwire.federation.flare.kits import require_flare
from thinwire.federation.flare.server import FlareServer
from thinwire.federation.flare.site import FlareSite
from thinwire.federation.follower import Follower
from thinwire.federation.processes import require_flower
from thinwire.federation.site import Site
from thinwire.federation.site_processes import SiteSide
from thinwire.federation.superlink import ServerSide

Sides = tuple[Follower, Callable[[Site], Attended]]  # the server's, and what makes a site's

# Whoever starts this federation owns the rows and the run file.
OPEN = f"""templates = "any"
choices = "any"
lengths = [2, {1 << 40}]
drop = true
max_rounds = {1 << 40}
max_runs = {1 << 40}
max_steps = {1 << 40}
max_batch = {1 << 40}
"""


class Local:
    """Server and sites below one folder: `clients` are the sites' rows by name. `report` is given lines for people.

    `engine`: which one carries the frames, of ENGINES.
    """

    def __init__(
        self,
        home: Path,
        clients: Mapping[str, Sequence[Row]],
        report: Callable[[str], None] = lambda line: None,
        engine: str = "flower",
    ) -> None:
        self.report, self.home, self.names = report, home.resolve(), tuple(clients)
        secrets = self.home / "keys"
        if not (secrets / "server.crt").exists():
            keys.make_server([], secrets)
        files: dict[str, Path] = {}
        for name, held in clients.items():
            files[name] = write_rows(self.place(name) / "data", held)
            (self.place(name) / "policy.toml").write_text(OPEN)
            if not (self.place(name) / f"{name}.key").exists():
                keys.register(name, keys.make_site(name, self.place(name)), secrets)
        self.server, side = ENGINES[engine](self.home, secrets, self.names)
        self.sites: dict[str, Attended] = {}
        for name in self.names:
            place = self.place(name)
            given: dict[str, Any] = {"data": str(files[name]), "policy": str(place / "policy.toml")}
            site = Site(name, folder=str(place), socket="", hold_out=False, allow_model=True, **given)
            self.sites[name] = side(site)

    def place(self, name: str) -> Path:
        """The folder of a site."""
        return self.home / "at" / name

    def start(self) -> None:
        """Start the server's side, then the sites."""
        self.server.start()
        for site in self.sites.values():
            site.start()

    def follow(
        self,
        folder: Path,
        run: Run,
        splits: Mapping[str, Sequence[Row]],
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        """See a run in a folder through, looking after all processes; hub.Ended where it does not come to its end."""
        files = {name: str(write_rows(folder.resolve() / "federation" / name, held)) for name, held in splits.items()}
        self.server.prepare(folder, run, files)

        def tick() -> None:
            for site in self.sites.values():
                if (line := site.tick()) is not None:
                    self.report(line)
            watch()

        self.server.follow(folder, tick)

    def kill(self, name: str) -> None:
        """Kill a site's node, as a machine that fails would: the site comes back by itself."""
        site = self.sites[name]
        os.kill(site.children.running[site.node].pid, signal.SIGKILL)

    def stop(self) -> None:
        """End all."""
        for site in self.sites.values():
            site.children.terminate()
        for site in self.sites.values():
            site.stop()
        self.server.stop()


def on_flower(home: Path, secrets: Path, names: Sequence[str]) -> Sides:
    """Both sides on Flower."""
    server = ServerSide(home, secrets, names)

    def side(site: Site) -> SiteSide:
        return SiteSide(site, f"127.0.0.1:{server.port}", Path(site.folder) / f"{site.name}.key", server.ca)

    return server, side


def on_flare(home: Path, secrets: Path, names: Sequence[str]) -> Sides:
    """Both sides on NVIDIA FLARE."""
    server = FlareServer(home, secrets, names)
    return server, lambda site: FlareSite(site, server.kits / site.name)


def require(engine: str) -> None:
    """ConfigError, with what to install, where the engine is not."""
    {"flower": require_flower, "nvflare": require_flare}[engine]()


ENGINES: dict[str, Callable[[Path, Path, Sequence[str]], Sides]] = {"flower": on_flower, "nvflare": on_flare}


def named(run: Run, clients: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """The clients under names for sites: the run file's, else their own where they will do, else site-N."""
    names: Sequence[str] = list(clients)
    if run.federation is not None and run.federation.sites:
        names = run.federation.sites
        if len(names) != len(clients):
            raise ConfigError(f"federation.sites: names {len(names)} sites for {len(clients)} clients")
    elif not all(re.fullmatch(keys.NAME, name) for name in names):
        names = [f"site-{number}" for number in range(1, len(clients) + 1)]
    return dict(zip(names, clients.values(), strict=True))


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """A file of the rows, by their kind .jsonl, or .arrow for what JSON has not, such as dates; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = [dict(row.fields) for row in rows]
    lines, arrow = path.with_name(f"{path.name}.jsonl"), path.with_name(f"{path.name}.arrow")
    try:
        text = "".join(json.dumps(fields) + "\n" for fields in held)
    except TypeError:
        import pyarrow

        columns = dict.fromkeys(name for fields in held for name in fields)
        try:
            table = pyarrow.table({name: [fields.get(name) for fields in held] for name in columns})
        except pyarrow.ArrowException:  # files of two kinds, a column of either with types of its own
            text = "".join(json.dumps(fields, default=str) + "\n" for fields in held)
        else:
            with pyarrow.ipc.new_file(str(arrow), table.schema) as file:
                file.write_table(table)
            return arrow
    lines.write_text(text, encoding="utf-8")
    return lines
