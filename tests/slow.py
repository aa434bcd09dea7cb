"""A transport within one process some of whose clients are late."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from thinwire.runtime.endpoint import Endpoint
from thinwire.runtime.inprocess import InProcess
from thinwire.runtime.round import Reply
from thinwire.wire import Frame

Forge = Callable[[Frame], Frame]


class Slow(InProcess):
    """The replies of some (round, client) come with the next round's; `forge` changes those on their way."""

    def __init__(self, endpoint: Endpoint, late: set[tuple[int, int]], forge: Forge = lambda frame: frame) -> None:
        super().__init__(endpoint)
        self.late, self.forge = late, forge
        self.waiting: dict[int, Reply] = {}
        self.asked: list[tuple[int, int]] = []

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        before, self.waiting = (self.waiting, {}) if action == "train" else ({}, self.waiting)
        for reply in super().exchange(frames, action):
            assert reply.frame is not None
            self.asked.append(where := (reply.frame.header().round, reply.client))
            if action == "train" and where in self.late:
                self.waiting[reply.client] = Reply(reply.client, self.forge(reply.frame))
                reply = Reply(reply.client, None, error="late")
            yield reply
        yield from before.values()

    def under_way(self, members: Collection[int]) -> tuple[int, ...]:
        self.waiting = {client: reply for client, reply in self.waiting.items() if client in members}
        return tuple(self.waiting)
