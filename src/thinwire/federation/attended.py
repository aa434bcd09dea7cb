"""A site's two processes, the engine's node and the worker beside it: both are started again when they die."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from thinwire.federation import channel
from thinwire.federation.processes import Children
from thinwire.federation.progress import Notices
from thinwire.federation.site import Site

FIRST, MOST = 5.0, 60.0  # seconds before a dead node is started again: at first, and at most
STEADY = 120.0  # seconds after which a node that dies is a new trouble and not the old one
LATE = (-signal.SIGALRM, 128 + signal.SIGALRM)  # how a worker ends that was at work for too long, and its sandbox


class Attended(ABC):
    """The processes of one site. `site.socket` is set here. `show` is given each command of the engine's that is run.

    `node`: the name of the engine's process.
    """

    node: str

    def __init__(self, site: Site, show: Callable[[Sequence[str]], None] = lambda command: None) -> None:
        self.folder = Path(site.folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self.sockets = channel.folder(self.folder)
        self.site = replace(site, socket=str(self.sockets / "worker"))
        self.lines: deque[str] = deque()  # to be reported
        self.notices = Notices(self.folder / "notices.txt")
        self.show = show
        self.children = Children(self.folder / "flwr", self.folder / "logs")
        self.printed = Notices(self.children.logs / f"{self.node}.log")
        self.site.write(self.folder / "site.json")
        self.wait, self.began, self.again = FIRST, 0.0, 0.0

    def start(self) -> None:
        """Start the worker, which takes a while to get ready, and the node."""
        self._worker()
        self._begin()

    def tick(self) -> str | None:
        """Start what has died again; a line about it if there is anything to report.

        A hub may refuse a node whose predecessor it still takes for connected: so with a growing pause.
        """
        self.lines.extend(self.notices.new())
        if (status := self.children.running["worker"].poll()) is not None:
            why = "was at one visit for longer than the policy's seconds" if status in LATE else "had died"
            self._worker()
            self.lines.append(f"{self.site.name}: its worker {why}, and is started again")
        if self.lines:
            return self.lines.popleft()
        if any(self._given_up(line) for line in self.printed.new()):
            self.children.kill(self.node)
        if self.children.running[self.node].poll() is None:
            return None
        now = time.monotonic()
        if self.again == 0.0:
            self.wait = FIRST if now - self.began > STEADY else min(self.wait * 2, MOST)
            self.again = now + self.wait
            return f"{self.site.name}: its node has ended: {self._why()}; again in {self.wait:g} seconds"
        if now >= self.again:
            self._begin()
        return None

    def stop(self) -> None:
        """End both."""
        self.children.stop()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def _begin(self) -> None:
        self.began, self.again = time.monotonic(), 0.0
        self.printed = Notices(self.children.logs / f"{self.node}.log")
        self._node()

    def _worker(self) -> None:
        self.children.start("worker", self.working)

    @property
    def working(self) -> list[str | Path]:
        """The worker's command."""
        return [sys.executable, "-m", "thinwire.federation.worker", self.folder / "site.json"]

    def _given_up(self, line: str) -> bool:
        """Whether a node that prints this stays without a further try."""
        return False

    @abstractmethod
    def _node(self) -> None:
        """Start the node."""

    @abstractmethod
    def _why(self) -> str:
        """Why the node has ended."""
