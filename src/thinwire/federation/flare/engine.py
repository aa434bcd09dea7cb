"""NVIDIA FLARE as the engine, at the server: a message is a call of a site's published method."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from thinwire.federation.engine import Aborted, About, Answer

POLL = 0.25  # seconds that a look for answers waits at most
SILENT = 15.0  # seconds without an answer from a site that is asked something, after which it is knocked at
CALLS = 16  # of a site at a time: those that are late are waited for, by threads, as long as their answers are of use
KNOCK = 60.0  # seconds that a site's process has to answer a knock, whatever its worker is at


class Flare:
    """The sites of a job, by their proxies: they are the same from its beginning to its end.

    A call that fails otherwise than by time or by the site's own word is the end of the job, and so is a site whose
    process does not answer a knock. FLARE ends a job once a site's process has died, but some seconds later, while
    rounds would go on without that site; and where the site's client died with it FLARE does not notice at all.
    """

    def __init__(self, sites: Sequence[Any], aborted: Callable[[], bool]) -> None:
        self.sites = dict(enumerate(sites, 1))
        self.aborted = aborted
        self.pool = ThreadPoolExecutor(max(1, CALLS * len(sites)), "thinwire")
        self.calls: dict[str, tuple[int, float, Future[Any]]] = {}  # node, until when it is of use, call
        self.knocks: dict[int, Future[Any]] = {}
        self.answered: dict[int, float] = {}  # when a node last answered, or was first asked
        self.numbers = itertools.count(1)
        self.news = threading.Event()

    def nodes(self, names: Sequence[str], keys: Mapping[str, bytes]) -> dict[int, int]:
        """See Engine; a site is the name in its certificate, and belongs to the run while that is registered."""
        numbers = {site.name: number for number, site in self.sites.items()}
        return {client: numbers[name] for client, name in enumerate(names) if name in numbers and name in keys}

    def push(self, node: int, piece: bytes, about: About, seconds: float, round: int) -> str:
        """See Engine."""
        now = time.monotonic()
        self.calls = {id: call for id, call in self.calls.items() if call[1] > now}  # nobody asks for others
        if node not in self._asked():
            self.answered[node] = now
        site, id = self.sites[node](timeout=seconds), f"{next(self.numbers)}"
        future = self.pool.submit(lambda: site.visit(about=about, piece=piece))
        self.calls[id] = (node, now + seconds, future)
        future.add_done_callback(lambda _: self.news.set())
        return id

    def pull(self, id: str) -> Answer | None:
        """See Engine."""
        from nvflare.collab.api.exceptions import CollabCallError, RunAborted

        self._check()
        node, _, future = self.calls.get(id, (0, 0.0, None))
        if future is None or not future.done():
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
        self.answered[node] = time.monotonic()
        if not isinstance(found, tuple | list) or list(map(type, found)) != [dict, bytes]:
            raise ValueError("an answer that is no table and no bytes")
        return Answer(node, found[1], found[0])

    def pause(self) -> None:
        """See Engine."""
        self._check()
        for node in self._asked() - set(self.knocks):
            if time.monotonic() > self.answered[node] + SILENT:
                self.knocks[node] = self.pool.submit(self.sites[node](timeout=KNOCK).knock)
        self.news.wait(POLL)
        self.news.clear()

    def close(self) -> None:
        """Ask nobody any more: FLARE waits at the end for threads that are left."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _asked(self) -> set[int]:
        return {node for node, _, future in self.calls.values() if not future.done()}

    def _check(self) -> None:
        """Raise Aborted where the job has no use any more."""
        if self.aborted():
            raise Aborted("FLARE has ended the job")
        for node, knock in list(self.knocks.items()):
            if knock.done():
                del self.knocks[node]
                if (wrong := knock.exception()) is not None:
                    raise Aborted(f"{self.sites[node].name} does not answer: {wrong}") from None
                self.answered[node] = time.monotonic()
