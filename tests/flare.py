"""FLARE's proxies in one process: the real engine and transport at one side, the sites' workers at the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from silos import Silos

from thinwire import assemble, config
from thinwire.federation.fingerprint import fingerprints
from thinwire.federation.flare.engine import Flare
from thinwire.federation.local import OPEN
from thinwire.federation.site import Site
from thinwire.federation.site_run import run_settings
from thinwire.federation.transport import Pieces
from thinwire.federation.worker import Worker
from thinwire.runtime.course import Job, Watch

ONE = threading.Lock()  # libraries' threads and settings are the process's: one site works at a time


class Proxy:
    """A site of a job, as the server's object sees it; `tamper` changes its answer, or raises what a call would."""

    def __init__(self, name: str, worker: Worker | None, settings: str = "") -> None:
        self.name, self.worker, self.settings = name, worker, settings
        self.tamper: Callable[[Any], Any] = lambda answer: answer
        self.timeouts: list[float] = []
        self.bodies: list[int] = []  # bytes of each piece that passed

    def __call__(self, timeout: float) -> Proxy:
        self.timeouts.append(timeout)
        return self

    def knock(self) -> None:
        """See visit."""
        self.tamper(None)

    def visit(self, *, about: dict[str, Any], piece: bytes) -> Any:
        """What the site's published method does, without its process."""
        answer: dict[str, Any] = {}
        body = b""
        if self.worker is not None:
            with ONE:
                answer, body = self.worker.answer({**about, "settings": self.settings}, piece)
        self.bodies += [len(piece), len(body)]
        return self.tamper(({"transfer": about["transfer"], **answer}, body))


def federate(silos: Silos, run: config.Run, folder: Path, **options: Any) -> tuple[Job, list[Proxy], Pieces]:
    """A run's job on the transport, the proxies of its sites, and the transport; `options` are the transport's."""
    clients = silos.rows(run).clients
    silos.begin(run, folder)
    policy = folder / "policy.toml"
    policy.write_text(OPEN)
    proxies = []
    settings = run_settings(run, tuple(clients), "0123456789abcdef")
    for name in clients:
        place, data = folder / "at" / name, silos.folder / "data" / f"{name}.jsonl"
        site = Site(name, str(data), str(place), "", hold_out=False, policy=str(policy), allow_model=True)
        proxies.append(Proxy(name, Worker(site), settings))
    engine = Flare(proxies[::-1], lambda: False)  # FLARE has an order of its own
    net, names = assemble.net_of(run, remember=True), list(clients)
    nodes = engine.nodes(names, dict.fromkeys(names, b"a key"))
    transport = Pieces(engine, lambda: nodes, folder / "spool", fingerprints(run, net), **{"patience": 0.0, **options})
    job = assemble.job(run, assemble.Rows({}, silos.rows(run).splits), net, folder, 0, Watch())
    job.names, job.transport = names, transport
    job.keep_versions = 8 + run.method.versions_each * len(clients)
    return job, proxies, transport
