"""A site of several processes, a GPU each: the worker has the others follow it into each visit that it begins.

worker            -- who and which run, the frame --> the others
                  <-- ready: model and rows are there --
                  -- go -->                              all train: see train.parallel
                  <-- what became of it --
                  -- over -->

The others have no socket of the engine's, no log and no word with the server: the worker has admitted the frame before
they see it, and what they make of it stays in their folders, `ranks/N`. Where one of them fails alone nobody could tell
what the rest hold: then all end, and the site starts them again, as it does a worker that has died.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from thinwire.core import Client, Method, StaleVersion
from thinwire.federation import channel
from thinwire.federation.asked import Question
from thinwire.federation.channel import Table
from thinwire.federation.processes import end_with_parent
from thinwire.federation.site import Site

if TYPE_CHECKING:
    from thinwire.federation.site_run import Visits
    from thinwire.wire import Frame

PLACE = "ranks"  # in the site's folder
GRACE = 30.0  # seconds within which all have failed where one has


class Ranks:
    """The worker's side: it is the first of `site.processes`. `notice`: is given the line for the site's operator."""

    def __init__(self, path: Path, notice: Callable[[str], None]) -> None:
        """Start the others, and wait until all have met; `path`: the site's file."""
        self.site, self.notice = Site.load(path), notice
        self.about: Table = {}
        self.links: dict[int, socket.socket] = {}
        place = Path(self.site.folder) / PLACE
        shutil.rmtree(place, ignore_errors=True)  # of processes that have ended
        place.mkdir(parents=True, mode=0o700)
        for rank in range(1, self.site.processes):
            mine, its = socket.socketpair()
            command = [sys.executable, "-m", "thinwire.federation.ranks", str(path), str(rank), str(its.fileno())]
            with its:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(its.fileno(),))
            self.links[rank] = mine
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()
        from thinwire.train import parallel

        parallel.meet(place / "meeting", 0, self.site.processes)

    def asked(self, question: Question, client: int) -> None:
        """What the others have to know of the visit that may begin now."""
        about = {"settings": question.settings, "site": question.site or "", "client": client}
        self.about = {**about, "counted": question.counted}

    @contextmanager
    def together(self, frame: Frame) -> Iterator[None]:
        """A visit to a frame, of all: see core.Client. Ends this process where one fails and another does not."""
        where = {} if frame.file is None else {"file": str(frame.file)}
        for rank, link in self.links.items():
            with self._or_end(rank):
                channel.send(link, {**self.about, **where}, b"" if where else bytes(frame))
        self._receive(None)
        self._send()
        try:
            yield
        except Exception as error:
            for link in self.links.values():
                link.settimeout(GRACE)
            self._receive(None if isinstance(error, StaleVersion) else error)  # that one is an answer like others
            raise
        else:
            self._receive(None)
        finally:
            for link in self.links.values():
                link.settimeout(None)
            self._send()

    def _receive(self, error: Exception | None) -> None:
        """What became of the others' work; it has to be what became of this one's."""
        for rank, link in self.links.items():
            with self._or_end(rank):
                table, _ = channel.receive(link)
                if (error is None) != (table["error"] == ""):
                    self._end(rank, str(table["error"]) or f"it has not failed, and the first one has: {error}")

    def _send(self) -> None:
        for rank, link in self.links.items():
            with self._or_end(rank):
                channel.send(link, {})

    @contextmanager
    def _or_end(self, rank: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a connection that has ended, or a process that stays in what the first has left
            self._end(rank, str(error))

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self._end(rank, f"it has ended ({process.wait()})")

    def _end(self, rank: int, why: str) -> NoReturn:
        self.notice(f"{self.site.name}: process {rank} of {self.site.processes} has failed: {why}")
        os._exit(1)


def follow(method: Method, frame: Frame, client: Client, spool: Path | None = None) -> Frame:
    """The action `train` of another process than the first: the visit, without a reply."""
    from thinwire import wire
    from thinwire.runtime.payloads import Ready

    with suppress(StaleVersion):
        method.client_update(wire.decode(method.Down, frame), client)
    header = frame.header()
    return wire.encode(Ready(), run=header.run, round=header.round, client=client.id, held=client.held)


class Companion:
    """Another process's side: it follows the worker, visit by visit."""

    def __init__(self, site: Site, rank: int) -> None:
        from thinwire.federation.policy import Policy
        from thinwire.federation.spent import Spent

        self.site, self.home = site, Path(site.folder)
        self.folder = self.home / PLACE / str(rank)
        self.folder.mkdir(mode=0o700)
        self.policy = Policy.load(Path(site.policy) if site.policy else None)
        self.spent = Spent(self.folder)
        self.settings = ""
        self.run: Visits | None = None

    def ready(self, table: Table) -> Visits:
        """Have the model, the rows, and what the site keeps of the run, as the worker has them now."""
        from thinwire.federation.site_run import Visits

        if self.run is None or self.settings != table["settings"]:
            self.run, self.settings = None, ""  # one model in memory, not two
            run = Visits(self.site, self.policy, str(table["settings"]), self.folder, self.spent)
            run.masked = {}  # the worker alone has masks
            run.seat(str(table["site"]) or None, int(table["client"]))
            run.load()
            run.read()
            run.endpoint.actions["train"] = follow
            self.run, self.settings = run, str(table["settings"])
        shutil.rmtree(self.run.folder, ignore_errors=True)
        kept = self.home / "runs" / self.run.name  # of the worker: whatever became of it, all begin where that one does
        shutil.copytree(kept, self.run.folder, ignore=shutil.ignore_patterns("replies"), copy_function=_link)
        return self.run

    def serve(self, link: socket.socket) -> None:
        """Follow the worker until it ends."""
        from thinwire import memory
        from thinwire.wire import Frame

        while True:
            table, body = channel.receive(link)
            frame = Frame.load(Path(str(table["file"]))) if "file" in table else Frame(body)
            with self._answered(link):
                run = self.ready(table)
            with self._answered(link):
                run.answer("train", frame, int(table["counted"]))
            memory.trim()

    @contextmanager
    def _answered(self, link: socket.socket) -> Iterator[None]:
        """Report to the worker what became of a piece of work, and wait for its answer; without one in time, end."""
        error = ""
        try:
            yield
        except Exception as wrong:
            traceback.print_exc()
            error = f"{type(wrong).__name__}: {wrong}"[:300]
            link.settimeout(GRACE)
        channel.send(link, {"error": error})
        channel.receive(link)
        link.settimeout(None)


def _link(source: str, target: str) -> None:
    """The same file under another name: those that a site keeps are replaced, and never changed."""
    try:
        os.link(source, target)
    except OSError:  # a disk that has no such links
        shutil.copy2(source, target)


def main(path: Path, rank: int, descriptor: int) -> None:
    """Follow the worker that has started this process, until it ends."""
    end_with_parent()
    site = Site.load(path)
    from thinwire.train import parallel

    parallel.meet(Path(site.folder) / PLACE / "meeting", rank, site.processes)
    with socket.socket(fileno=descriptor) as link, suppress(ConnectionError):
        Companion(site, rank).serve(link)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
