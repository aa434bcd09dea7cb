"""The in-process transport: one resident model serves any number of simulated clients, one after another."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

from thinwire.runtime.endpoint import Endpoint
from thinwire.runtime.round import Reply
from thinwire.wire import Frame, WireError


class InProcess:
    """Has an endpoint in this process answer each frame, when its reply is asked for."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        """See round.Transport. A client that cannot use its frame gives no reply, with the reason."""
        for client, frame in frames:
            started = time.perf_counter()
            answer, error = None, None
            try:
                answer = self.endpoint.answer(action, frame)
            except WireError as wrong:
                error = f"{type(wrong).__name__}: {wrong}"
            finally:
                frame.remove()
            yield Reply(client, answer, time.perf_counter() - started, error)

    def again(self, client: int, frame: Frame) -> Reply:
        """See round.Transport."""
        (reply,) = self.exchange([(client, frame)])
        return reply

    def under_way(self, members: Collection[int]) -> tuple[int, ...]:
        """See round.Transport: whoever is asked here answers at once."""
        return ()
