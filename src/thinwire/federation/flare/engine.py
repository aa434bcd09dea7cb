"""NVIDIA FLARE as the engine, at the server: a message is a call of a site's published method."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from thinwire.federation.engine import Aborted, About, Answer
from thinwire.federation.transport import AHEAD

POLL = 0.25  # seconds that a look for answers waits at most


class Flare:
    """The sites of a job, by their proxies: they are the same from its beginning to its end.

    A call that fails otherwise than by time or by the site's own word is the end of the job: FLARE ends it once a
    site's process is gone, some seconds later, and meanwhile rounds would go on without that site. Raises Aborted.
    """

    def __init__(self, sites: Sequence[Any], aborted: Callable[[], bool]) -> None:
        self.sites = dict(enumerate(sites, 1))
        self.aborted = aborted
        self.pool = ThreadPoolExecutor(max(1, AHEAD * len(sites)), "thinwire")
        self.calls: dict[str, tuple[int, Future[Any]]] = {}
        self.numbers = itertools.count(1)
        self.news = threading.Event()

    def nodes(self, names: Sequence[str], keys: Mapping[str, bytes]) -> dict[int, int]:
        """See Engine; a site is the name in its certificate, and belongs to the run while that is registered."""
        numbers = {site.name: number for number, site in self.sites.items()}
        return {client: numbers[name] for client, name in enumerate(names) if name in numbers and name in keys}

    def push(self, node: int, piece: bytes, about: About, seconds: float, round: int) -> str:
        """See Engine."""
        site, id = self.sites[node](timeout=seconds), f"{next(self.numbers)}"
        future = self.pool.submit(lambda: site.visit(about=about, piece=piece))
        self.calls[id] = (node, future)
        future.add_done_callback(lambda _: self.news.set())
        return id

    def pull(self, id: str) -> Answer | None:
        """See Engine."""
        from nvflare.collab.api.exceptions import CollabCallError, RunAborted

        if self.aborted():
            raise Aborted("FLARE has ended the job")
        node, future = self.calls[id]
        if not future.done():
            return None
        del self.calls[id]
        try:
            found = future.result()
        except RunAborted as wrong:
            raise Aborted(str(wrong)) from None
        except CollabCallError as wrong:
            if wrong.cause_type != TimeoutError.__name__ and wrong.remote_traceback is None:
                raise Aborted(str(wrong)) from None
            return Answer(node, error=f"{wrong.cause_type}: {wrong.cause}")
        if not isinstance(found, tuple | list) or list(map(type, found)) != [dict, bytes]:
            raise ValueError("an answer that is no table and no bytes")
        return Answer(node, found[1], found[0])

    def pause(self) -> None:
        """See Engine."""
        if self.aborted():
            raise Aborted("FLARE has ended the job")
        self.news.wait(POLL)
        self.news.clear()
