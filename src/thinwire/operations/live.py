"""The report of a run as a page that is served on loopback and fills itself as rounds come in."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thinwire.data.errors import DataError
from thinwire.data.shown import printable
from thinwire.operations.loopback import served
from thinwire.operations.status import counts, run_status
from thinwire.report.page import render
from thinwire.report.runs import collect
from thinwire.units import size, span

RECORDS = (
    "run.toml",
    "rounds.jsonl",
    "evals.jsonl",
    "summary.json",
    "contributions.json",
    "cross.json",
)  # what the page shows
WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<title>thinwire watch</title><link rel="icon" href="data:,"><p role="status">No round has ended yet.</p></html>
"""


class Live:
    """A run's page and where it stands, made anew when its records have changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.made: tuple[str, bytes] | None = None

    def mark(self) -> str:
        """What changes with the run's records."""
        digest = hashlib.sha256()
        for name in RECORDS:
            try:
                at = (self.folder / name).stat()
            except OSError:
                continue
            digest.update(f"{name} {at.st_size} {at.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def page(self) -> bytes:
        """The page as it is now; one that waits before there is a record."""
        with self.lock:
            mark = self.mark()
            if self.made is None or self.made[0] != mark:
                try:
                    found = collect([self.folder])
                except DataError:  # no record yet, or one is being written
                    return WAITING.encode()
                self.made = mark, render(found, self.lines(), mark).encode()
            return self.made[1]

    def state(self) -> bytes:
        """The mark, and where the run stands, in lines."""
        return json.dumps({"mark": self.mark(), "lines": [printable(line) for line in self.lines()]}).encode()

    def lines(self) -> list[str]:
        """Where the run stands: its state first, then its clients, and what was dropped."""
        run = run_status(self.folder)
        left = f", about {span(run.left)} to go" if run.left else ""
        why = f" ({run.why})" if run.why else ""
        last = f"; the last ended at {_clock(run.changed)}" if run.changed else ""
        lines = [f"{run.state}{why}: {run.round} of {run.rounds} rounds{left}{last}"]
        lines.append(f"{size(run.bytes_down)} down, {size(run.bytes_up)} up")
        there = [client for client in run.clients if client.seen is not None or client.connected is not None]
        for client in there:
            state = "left" if not client.member else "connected" if client.connected else "not connected"
            seen = f", last seen at {_clock(client.seen)}" if client.seen is not None else ""
            reply = f", last reply in round {client.round}" if client.round is not None else ""
            lines.append(f"{client.name}: {state}{seen}{reply}")
        if run.drops:
            kinds = ", ".join(f"{kind} {count}" for kind, count in counts(run.drops).items())
            lines.append(f"replies that did not count: {kinds}")
        return lines


@contextmanager
def serving(folder: Path, port: int) -> Iterator[int]:
    """Serve the run's page on loopback; yields the port, any free one for 0. OSError where it is taken."""
    live = Live(folder)
    paths = {"/": ("text/html; charset=utf-8", live.page), "/state": ("application/json", live.state)}
    with served(paths, port) as found:
        yield found


def _clock(then: float | None) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(then))
