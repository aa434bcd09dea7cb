"""When each site was last connected or answered, in a file of the run's folder that `thinwire status` reads."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from thinwire import files

EVERY = 5.0  # seconds between two writes, where only times are new


class Seen:
    """federation/seen.json: name -> `id`, `seen` (seconds since 1970), `connected`, `member`.

    `names`: of the run's clients, by number; it may grow.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.path, self.names = folder / "federation" / "seen.json", names
        self.sites: dict[str, dict[str, Any]] = {}
        self.written = 0.0
        with suppress(OSError, ValueError):  # none yet, or one that is of no use
            self.sites = dict(json.loads(self.path.read_bytes()))

    def connected(self, clients: Collection[int]) -> None:
        """These clients' nodes are there now, and no others."""
        now, new = time.time(), False
        for id, name in enumerate(self.names):
            there = id in clients
            new |= self.sites.get(name, {}).get("connected") is not there
            self._note(name, id=id, connected=there, **({"seen": now} if there else {}))
        self._write(new)

    def answered(self, client: int) -> None:
        """A reply of the client has come."""
        self._note(self.names[client], id=client, seen=time.time())
        self._write(False)

    def members(self, clients: Collection[int]) -> None:
        """These clients belong to the run now."""
        for id, name in enumerate(self.names):
            self._note(name, id=id, member=id in clients)
        self._write(True)

    def _note(self, name: str, **about: Any) -> None:
        self.sites[name] = {**self.sites.get(name, {}), **about}

    def _write(self, new: bool) -> None:
        if new or time.monotonic() - self.written > EVERY:
            files.write(self.path, json.dumps(self.sites))
            self.written = time.monotonic()
