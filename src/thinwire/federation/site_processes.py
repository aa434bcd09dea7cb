"""A site's side: Flower's SuperNode with the site's key, and the worker beside it; both started again when they die.

Confined, each has a sandbox: Flower's processes, which run whatever the hub ships, see the key, the worker's socket and
the server's address; the worker sees the rows and no network. So what leaves passes the worker and the site's policy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from thinwire.errors import ConfigError
from thinwire.federation import sandbox
from thinwire.federation.attended import Attended
from thinwire.federation.outlet import Outlet
from thinwire.federation.processes import BIN, LEAN, below, free_port
from thinwire.federation.reach import Away, greet, place_of
from thinwire.federation.sandbox import Sandbox
from thinwire.federation.site import Site

KNOWN = {  # what Flower prints, and what it means here
    "[code: 2004]": "the server does not take this site's key: it is not registered there (thinwire keys register), "
    "or another node is connected with it, or was a minute ago",
}
GIVEN_UP = "SSL/TLS handshake error detected"  # what the node prints then, and stays there without a further try
TASK = "flwr-clientapp"  # the process that Flower starts for a message
QUIET = 4.0  # seconds without one after which the node has passed on what it was given; it asks for more each 3


class SiteSide(Attended):
    """The processes of one site on Flower; see Attended. `confine`: what each of them runs in, if not in the open."""

    node = "supernode"

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
        super().__init__(site, show)
        self.server, self.key, self.ca = server, key.resolve(), ca.resolve()
        self.confine, self.outlet = confine, Outlet(*place_of(server, "--server"))
        if confine is not None:
            self.children.environment = sandbox.environment(self.children.environment)
            self.children.home.mkdir(exist_ok=True)
        self.port = free_port()
        self.busy = 0.0  # when it was first asked for, or a task of Flower's was last seen at work

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
        super().stop()
        self.outlet.close()

    def _given_up(self, line: str) -> bool:
        return GIVEN_UP in line

    def _why(self) -> str:
        """Why the node has ended: what a handshake of our own finds, else what it has printed, in words of ours."""
        try:
            greet(self.server, self.ca)
        except (Away, ConfigError) as wrong:
            return str(wrong)
        printed = self.children.why("supernode")
        return next((text for mark, text in KNOWN.items() if mark in printed), printed)

    def _worker(self) -> None:
        if self.confine is None:
            super()._worker()
            return
        named = (self.site.data, self.site.heldout, self.site.model, self.site.policy, self.site.key, self.site.peers)
        given = [part for name in named if name is not None for part in sandbox.parts(Path(name))]
        devices = sandbox.graphics()
        given += [Path("/sys")] if devices else []
        inside = self.confine.command(self.working, given, [self.folder, self.sockets], devices)
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
