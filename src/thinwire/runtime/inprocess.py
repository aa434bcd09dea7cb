"""The in-process transport: one resident model serves any number of simulated clients, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from thinwire.core import Client, Method, Reply, serve
from thinwire.wire import Frame, Spooled, WireError, peek


class InProcess:
    """Hands each frame to `serve` in this process, when its reply is asked for.

    `client(id, round)` makes the client that a frame is for; `done(client)` is told when it has answered.
    """

    def __init__(
        self,
        method: Method,
        client: Callable[[int, int], Client],
        done: Callable[[Client], None] = lambda client: None,
        spool: Path | None = None,
    ) -> None:
        self.method, self.client, self.done, self.spool = method, client, done, spool

    def exchange(self, frames: Iterable[tuple[int, Frame]]) -> Iterator[Reply]:
        """See core.Transport. A client that cannot use its frame gives no reply, with the reason."""
        for client_id, frame in frames:
            started = time.perf_counter()
            try:
                client = self.client(client_id, peek(frame).round)
                answer = serve(self.method, frame, client, self.spool)
                self.done(client)
                reply = Reply(client_id, answer, time.perf_counter() - started)
            except WireError as error:
                reply = Reply(client_id, None, time.perf_counter() - started, f"{type(error).__name__}: {error}")
            finally:
                if isinstance(frame, Spooled):
                    frame.remove()
            yield reply
