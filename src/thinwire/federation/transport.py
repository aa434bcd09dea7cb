"""The transport on an engine's messages: frames as opaque bytes, in pieces where they are large.

A message carries one piece of one frame: an array of bytes of a type of its own, and a record of which piece.
A site answers each piece; the answer to the last one is the reply's first piece, and the others are asked for. Both
sides keep a large frame in a file, so that no process holds more of it than a piece; and no more than AHEAD pieces of a
client are on their way at a time, for the engine's hub holds them in memory.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from thinwire.federation.call import SHOWN, Call
from thinwire.federation.engine import About, Engine
from thinwire.runtime.round import Reply, shown
from thinwire.runtime.survey import SMALL
from thinwire.wire import Frame
from thinwire.wire.frame import MAX_FRAME

AHEAD = 2  # messages of a client on their way: one that its site works on, and one that waits for it there
GRACE = 60.0  # seconds beyond the deadline after which the engine drops a message


class NoQuorum(RuntimeError):
    """Fewer replies than the run asks for came in time; the run can go on from its last whole round."""


class Pieces:
    """Hands frames to the nodes of an engine. `nodes()` has the node of each client now.

    `about` goes with every message: what sites compare at joining. `deadline` seconds after a round has begun its
    missing replies count as lost; fewer than `quorum` of them raise NoQuorum. A client without a node is waited for,
    `patience` seconds at most.

    `counted` is client -> the last round whose reply came in time. Each frame carries it to its client, which takes
    its memory as it was after that round: a reply that was lost leaves no trace, as if the client had been absent.

    With `late` a reply that misses its deadline may come until the end of the next round. Its site is asked nothing
    meanwhile: it would begin where that reply began, and both would have, say, its debt.
    """

    def __init__(
        self,
        engine: Engine,
        nodes: Callable[[], Mapping[int, int]],
        spool: Path,
        about: Mapping[str, str] | None = None,
        *,
        deadline: float = 3600.0,
        quorum: int = 1,
        patience: float = 120.0,
        chunk_bytes: int = 3 << 24,
        max_bytes: int = MAX_FRAME,
        counted: Mapping[int, int] | None = None,
        late: bool = False,
        names: Sequence[str] = (),  # of the clients' sites
    ) -> None:
        self.names = names
        self.engine, self.nodes, self.spool, self.about = engine, nodes, spool, dict(about or {})
        self.deadline, self.quorum, self.patience = deadline, quorum, patience
        self.chunk_bytes, self.max_bytes = chunk_bytes, max_bytes
        self.counted: dict[int, int] = dict(counted or {})
        self.late = late
        self._late: dict[int, Call] = {}  # of the last round
        self._round = -1
        self._until = 0.0
        self._answered: set[int] = set()

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        """See round.Transport; raises NoQuorum once all replies of a round's `train` are in or late."""
        if action != "train":
            yield from self.ask(action, frames, max_bytes=SMALL)
            return
        asked, lost = 0, ""
        late, self._late = self._late, {}
        for call in late.values():
            self._begin(call.round + 1)
        for reply in self.ask("train", frames, late=late):
            asked += 1
            if reply.frame is None and not lost:
                lost = f"; client {reply.client}: {reply.error}"
            yield self._count(reply, late[reply.client].round if reply.client in late else self._round)
        if len(self._answered) < min(self.quorum, asked):
            came = f"{len(self._answered)} of {asked} replies came, {self.quorum} must"
            round, self._round, self._late = self._round, -1, {}  # a second attempt at it has time anew
            raise NoQuorum(f"round {round}: {came}{lost}")

    def again(self, client: int, frame: Frame) -> Reply:
        """See round.Transport; within the deadline of the round."""
        (reply,) = self.ask("train", [(client, frame)])
        return self._count(reply, self._round)

    def under_way(self, members: Collection[int]) -> tuple[int, ...]:
        """See round.Transport."""
        for client in self._late.keys() - {*members}:
            self._late.pop(client).lose()
        return tuple(self._late)

    def _begin(self, round: int) -> None:
        if round != self._round:
            self._round, self._until, self._answered = round, time.monotonic() + self.deadline, set()

    def _count(self, reply: Reply, round: int) -> Reply:
        if reply.frame is not None:
            self._answered.add(reply.client)
            self.counted[reply.client] = round
        return reply

    def ask(
        self,
        action: str,
        frames: Iterable[tuple[int, Frame]],
        *,
        max_bytes: int | None = None,
        patience: float | None = None,
        late: Mapping[int, Call] | None = None,
    ) -> Iterator[Reply]:
        """Send each frame for `action`; yield the replies in the frames' order, and then those of `late` calls.

        `max_bytes` of a reply and `patience` are the transport's own where they are not given.
        """
        late = late or {}
        calls: list[Call] = []
        nodes: Mapping[int, int] = {}
        patient = time.monotonic() + (self.patience if patience is None else patience)  # for all
        try:
            for client, frame in frames:
                round = frame.header().round
                if action == "train":
                    self._begin(round)
                if client not in nodes:
                    nodes = self._connected(client, patient)
                call = Call(
                    client,
                    nodes.get(client, 0),
                    action,
                    round,
                    secrets.token_hex(8),
                    time.monotonic(),
                    self.counted.get(client, 0),
                    frame,
                    self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes),
                    self.chunk_bytes,
                    deque((offset, len(frame)) for offset in range(0, len(frame), self.chunk_bytes)),
                )
                calls.append(call)
                if client not in nodes:
                    call.error = "not connected"
                elif client in self._late:
                    call.error = f"busy with round {self._late[client].round}"
                else:
                    self._feed(call)
                self._pull([other for other in calls if other.ahead])  # nobody waits while more frames are made
            calls += late.values()
            until = self._until if action == "train" else time.monotonic() + self.deadline
            for call in calls:
                while not call.done and time.monotonic() <= until:
                    if not self._pull(calls):
                        self.engine.pause()
                if call.done:
                    call.drop()
                    yield call.reply
                    continue
                error = f"late: no reply within {self.deadline:g} seconds"
                if self.late and action == "train" and call.client not in late:
                    self._late[call.client] = call
                    yield Reply(call.client, None, time.monotonic() - call.began, error)
                else:
                    call.error = error
                    yield call.reply
        finally:
            for call in calls:
                if call not in self._late.values():
                    call.drop()

    def _connected(self, client: int, until: float) -> Mapping[int, int]:
        """The nodes that there are, once the client is among them or it is too late."""
        while client not in (nodes := self.nodes()) and time.monotonic() < until:
            self.engine.pause()
        return nodes

    def _feed(self, call: Call) -> None:
        """Send as many messages as may be on their way."""
        while call.error is None and call.ahead and len(call.waiting) < AHEAD:
            offset, total = call.ahead.popleft()
            self._push(call, call.frame.read(offset, self.chunk_bytes) if total else b"", offset=offset, total=total)
            if not call.ahead:
                call.drop()

    def _push(self, call: Call, piece: bytes, **place: int) -> None:
        about: About = {**self.about, **place, "action": call.action, "transfer": call.transfer}
        about |= {"room": self.chunk_bytes, "counted": call.counted}
        if call.client < len(self.names):
            about["site"] = self.names[call.client]
        seconds = self.deadline * (1 + 2 * self.late) + GRACE  # of two rounds, and what is evaluated between them
        id = self.engine.push(call.node, piece, about, seconds, call.round)
        if not id:
            call.error = "the engine did not take the message"
        else:
            call.waiting.add(id)

    def _pull(self, calls: list[Call]) -> bool:
        """Take in what has come, one message in memory at a time; whether there was any."""
        found = False
        for call in calls:
            for id in [] if call.done else sorted(call.waiting):
                try:
                    if (answer := self.engine.pull(id)) is None:
                        continue
                    call.take(answer, self.spool)
                except (ValueError, OSError) as error:
                    call.error = shown(f"{type(error).__name__}: {error}", SHOWN)
                found = True
                call.waiting.discard(id)
                self._feed(call)
                if not (call.done or call.ahead or call.waiting):
                    call.error = "all pieces were taken in, and no reply came: its worker has begun anew between them"
                if call.done:
                    call.seconds = time.monotonic() - call.began
                    break
        return found
