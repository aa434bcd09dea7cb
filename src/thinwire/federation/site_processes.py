"""A site's side: Flower's SuperNode with the site's key, and the worker beside it; both started again when they die.

Confined, each has a sandbox: Flower's processes, which run whatever the hub ships, see the key, the worker's socket and
the server's address; the worker sees the rows and no network. So what leaves passes the worker and the site's policy.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from thinwire.errors import ConfigError
from thinwire.federation import channel, sandbox
from thinwire.federation.outlet import Outlet
from thinwire.federation.processes import BIN, LEAN, Children, below, free_port
from thinwire.federation.progress import Notices
from thinwire.federation.reach import Away, greet, place_of
from thinwire.federation.sandbox import Sandbox
from thinwire.federation.site import Site

FIRST, MOST = 5.0, 60.0  # seconds before a dead node is started again: at first, and at most
KNOWN = {  # what Flower prints, and what it means here
    "[code: 2004]": "the server does not take this site's key: it is not registered there (thinwire keys register), "
    "or another node is connected with it, or was a minute ago",
}
GIVEN_UP = "SSL/TLS handshake error detected"  # what the node prints then, and stays there without a further try
TASK = "flwr-clientapp"  # the process that Flower starts for a message
QUIET = 4.0  # seconds without one after which the node has passed on what it was given; it asks for more each 3
STEADY = 120.0  # seconds after which a node that dies is a new trouble and not the old one
LATE = (-signal.SIGALRM, 128 + signal.SIGALRM)  # how a worker ends that was at work for too long, and its sandbox


class SiteSide:
    """The processes of one site. `site.socket` is set here. `show` is given each Flower command that is run.

    `confine`: what each of them runs in, if not in the open.
    """

    def __init__(
        self,
        site: Site,
        server: str,
        key: Path,
        ca: Path,
        *,
        confine: Sandbox | None = None,
        show: Callable[[Sequence[str]], None] = lambda command: None,
    ) -> None:
        self.folder = Path(site.folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self.sockets = channel.folder(self.folder)
        self.site = replace(site, socket=str(self.sockets / "worker"))
        self.lines: deque[str] = deque()  # to be reported
        self.notices = Notices(self.folder / "notices.txt")
        self.server, self.key, self.ca, self.show = server, key.resolve(), ca.resolve(), show
        self.children = Children(self.folder / "flwr", self.folder / "logs")
        self.confine, self.outlet = confine, Outlet(*place_of(server, "--server"))
        if confine is not None:
            self.children.environment = sandbox.environment(self.children.environment)
            self.children.home.mkdir(exist_ok=True)
        self.printed = Notices(self.children.logs / "supernode.log")
        self.site.write(self.folder / "site.json")
        self.port = free_port()
        self.wait, self.began, self.again = FIRST, 0.0, 0.0
        self.busy = 0.0  # when it was first asked for, or a task of Flower's was last seen at work

    def start(self) -> None:
        """Start the worker, which takes a while to get ready, and the node."""
        self._worker()
        self._node()

    def tick(self) -> str | None:
        """Start what has died again; a line about it if there is anything to report.

        The hub refuses a node whose predecessor it still takes for connected, for a minute: so with a growing pause.
        """
        self.lines.extend(self.notices.new())
        if (status := self.children.running["worker"].poll()) is not None:
            why = "was at one visit for longer than the policy's seconds" if status in LATE else "had died"
            self._worker()
            self.lines.append(f"{self.site.name}: its worker {why}, and is started again")
        if self.lines:
            return self.lines.popleft()
        if any(GIVEN_UP in line for line in self.printed.new()):
            self.children.kill("supernode")
        if self.children.running["supernode"].poll() is None:
            return None
        now = time.monotonic()
        if self.again == 0.0:
            self.wait = FIRST if now - self.began > STEADY else min(self.wait * 2, MOST)
            self.again = now + self.wait
            return f"{self.site.name}: its node has ended: {self._why()}; again in {self.wait:g} seconds"
        if now >= self.again:
            self._node()
        return None

    def idle(self) -> bool:
        """Whether no task of Flower's was at work for a moment: the last answer has left, and no frame has come."""
        node = self.children.running.get("supernode")
        if node is None:
            return True
        if not self.busy or any(TASK in command for _, command in below(node.pid)):
            self.busy = time.monotonic()
        return time.monotonic() - self.busy > QUIET

    def stop(self) -> None:
        """End both."""
        self.children.stop()
        self.outlet.close()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def _why(self) -> str:
        """Why the node has ended: what a handshake of our own finds, else what it has printed, in words of ours."""
        try:
            greet(self.server, self.ca)
        except (Away, ConfigError) as wrong:
            return str(wrong)
        printed = self.children.why("supernode")
        return next((text for mark, text in KNOWN.items() if mark in printed), printed)

    def _worker(self) -> None:
        command: list[str | Path] = [sys.executable, "-m", "thinwire.federation.worker", self.folder / "site.json"]
        if self.confine is None:
            self.children.start("worker", command)
            return
        named = (self.site.data, self.site.heldout, self.site.model, self.site.policy)
        given = [part for name in named if name is not None for part in sandbox.parts(Path(name))]
        devices = sandbox.graphics()
        given += [Path("/sys")] if devices else []
        inside = self.confine.command(command, given, [self.folder, self.sockets], devices)
        self.show(inside)
        self.children.start("worker", inside, NUMBA_CACHE_DIR=str(self.folder / "compiled"))

    def _node(self) -> None:
        command = [
            str(BIN / "flower-supernode"),
            *("--superlink", self.server),
            *("--root-certificates", str(self.ca)),
            *("--auth-supernode-private-key", str(self.key)),
            *("--node-config", f'name="{self.site.name}" socket="{self.site.socket}"'),
            *("--host", "127.0.0.1"),
            *("--port", str(self.port)),
        ]
        self.began, self.again = time.monotonic(), 0.0
        self.printed = Notices(self.children.logs / "supernode.log")
        if self.confine is None:
            self.show(command)
            self.children.start("supernode", command, **LEAN)
            return
        with self.outlet.open() as link:
            outlet = [sys.executable, "-m", "thinwire.federation.outlet", str(link.fileno())]
            given = [self.key, self.ca, self.sockets]
            inside = self.confine.command([*outlet, *command], given, [self.children.home])
            self.show(inside)
            self.children.hand("supernode", inside, [link.fileno()], **LEAN)
