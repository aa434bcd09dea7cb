"""A site as its own operator describes it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Site:
    """What a worker knows of its site, in a file of JSON.

    `heldout`: a file of rows to score on; without it, and with `hold_out`, the share that the run file holds out of
    `data` as a run in one process would. `model`, `device`, `threads`: in place of the run file's. `key`, and the
    folder `peers` of the other sites' public ones: in secure sums it vouches for its keys, and asks the same of them.
    `processes`: among how many the work of a step is shared, see ranks.
    """

    name: str
    data: str
    folder: str
    socket: str
    heldout: str | None = None
    hold_out: bool = True
    model: str | None = None
    device: str | None = None
    threads: int | None = None
    policy: str | None = None
    allow_model: bool = False
    key: str | None = None
    peers: str | None = None
    processes: int = 1

    def write(self, path: Path) -> None:
        """The file that `load` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Site:
        """The inverse of `write`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
