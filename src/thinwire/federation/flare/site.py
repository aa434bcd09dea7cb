"""A site's side on FLARE: its client with the site's kit, and the worker beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from thinwire.federation.attended import Attended
from thinwire.federation.flare import kits
from thinwire.federation.flare.server import end_jobs, process
from thinwire.federation.processes import LEAN
from thinwire.federation.site import Site


class FlareSite(Attended):
    """The processes of one site on FLARE, which starts one more for each job; see Attended."""

    node = "client"

    def __init__(self, site: Site, kit: Path, show: Callable[[Sequence[str]], None] = lambda command: None) -> None:
        super().__init__(site, show)
        self.kit = kit

    def stop(self) -> None:
        """See Attended."""
        end_jobs(self.children, self.node)
        super().stop()

    def _node(self) -> None:
        kits.socket_file(self.kit).write_text(json.dumps({"socket": self.site.socket}), encoding="utf-8")
        command = process("client", self.kit, self.site.name)
        self.show(command)
        self.children.start(self.node, command, **LEAN)

    def _why(self) -> str:
        return self.children.why(self.node)
