"""The transport on Flower's Grid: frames as opaque bytes, in pieces where they are large. None of its strategies.

A message carries one piece of one frame: an array of bytes of a type of its own, and a record of which piece.
A site answers each piece; the answer to the last one is the reply's first piece, and the others are asked for. Both
sides keep a large frame in a file, so that no process holds more of it than a piece; and no more than AHEAD pieces of a
client are on their way at a time, for the engine's hub holds them in memory.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.federation.envelope import Config, of, pack, unpack
from thinwire.runtime.round import Reply, shown
from thinwire.runtime.survey import SMALL
from thinwire.wire import Frame, WireError
from thinwire.wire.frame import MAX_FRAME, SPOOL_ABOVE

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

POLL = 0.25  # seconds between two looks for replies
AHEAD = 2  # messages of a client on their way: one that its site works on, and one that waits for it there
SHOWN = 200  # characters of an error that are kept
NOTHING = Frame(b"")
GRACE = 60.0  # seconds beyond the deadline after which the engine drops a message


class NoQuorum(RuntimeError):
    """Fewer replies than the run asks for came in time; the run can go on from its last whole round."""


@dataclass
class _Call:
    """One client's frame on its way, and its reply."""

    client: int
    node: int
    action: str
    round: int
    transfer: str
    began: float
    counted: int  # the last round of the client that counts
    frame: Frame  # NOTHING once all of it is on its way
    max_bytes: int  # of the reply
    ahead: deque[tuple[int, int]] = field(default_factory=deque)  # (offset, total) of messages to come; total 0: asks
    waiting: set[str] = field(default_factory=set)  # ids of messages that have no answer yet
    got: dict[int, int] = field(default_factory=dict)  # offset -> bytes of the reply
    total: int | None = None
    small: bytes = b""
    file: Path | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.error is not None or (self.total is not None and sum(self.got.values()) == self.total)

    def drop(self) -> None:
        """Remove the frame: all of it is on its way, or will not be."""
        self.frame.remove()
        self.frame = NOTHING


class Flower:
    """Hands frames to the nodes of a Flower grid. `nodes()` has the node of each client now.

    `about` goes with every message: what sites compare at joining. `deadline` seconds after a round has begun its
    missing replies count as lost; fewer than `quorum` of them raise NoQuorum. A client without a node is waited for,
    `patience` seconds at most.

    `counted` is client -> the last round whose reply came in time. Each frame carries it to its client, which takes
    its memory as it was after that round: a reply that was lost leaves no trace, as if the client had been absent.
    """

    def __init__(
        self,
        grid: Grid,
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
        names: Sequence[str] = (),  # of the clients' sites
    ) -> None:
        self.names = names
        self.grid, self.nodes, self.spool, self.about = grid, nodes, spool, dict(about or {})
        self.deadline, self.quorum, self.patience = deadline, quorum, patience
        self.chunk_bytes, self.max_bytes = chunk_bytes, max_bytes
        self.counted: dict[int, int] = dict(counted or {})
        self._round = -1
        self._until = 0.0
        self._answered: set[int] = set()

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        """See round.Transport; raises NoQuorum once all replies of a round's `train` are in or late."""
        if action != "train":
            yield from self.ask(action, frames, max_bytes=SMALL)
            return
        asked, lost = 0, ""
        for reply in self.ask("train", frames):
            asked += 1
            if reply.frame is None and not lost:
                lost = f"; client {reply.client}: {reply.error}"
            yield self._count(reply)
        if len(self._answered) < min(self.quorum, asked):
            came = f"{len(self._answered)} of {asked} replies came, {self.quorum} must"
            round, self._round = self._round, -1  # a second attempt at it has time anew
            raise NoQuorum(f"round {round}: {came}{lost}")

    def again(self, client: int, frame: Frame) -> Reply:
        """See round.Transport; within the deadline of the round."""
        (reply,) = self.ask("train", [(client, frame)])
        return self._count(reply)

    def _count(self, reply: Reply) -> Reply:
        if reply.frame is not None:
            self._answered.add(reply.client)
            self.counted[reply.client] = self._round
        return reply

    def ask(
        self,
        action: str,
        frames: Iterable[tuple[int, Frame]],
        *,
        max_bytes: int | None = None,
        patience: float | None = None,
    ) -> Iterator[Reply]:
        """Send each frame for `action`; yield the replies in the frames' order.

        `max_bytes` of a reply and `patience` are the transport's own where they are not given.
        """
        calls: list[_Call] = []
        nodes: Mapping[int, int] = {}
        patient = time.monotonic() + (self.patience if patience is None else patience)  # for all
        try:
            for client, frame in frames:
                round = frame.header().round
                if action == "train" and round != self._round:
                    self._round, self._until, self._answered = round, time.monotonic() + self.deadline, set()
                if client not in nodes:
                    nodes = self._connected(client, patient)
                call = _Call(
                    client,
                    nodes.get(client, 0),
                    action,
                    round,
                    secrets.token_hex(8),
                    time.monotonic(),
                    self.counted.get(client, 0),
                    frame,
                    self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes),
                    deque((offset, len(frame)) for offset in range(0, len(frame), self.chunk_bytes)),
                )
                calls.append(call)
                if client not in nodes:
                    call.error = "not connected"
                else:
                    self._feed(call)
                self._pull([other for other in calls if other.ahead])  # nobody waits while more frames are made
            until = self._until if action == "train" else time.monotonic() + self.deadline
            for call in calls:
                while not call.done:
                    if time.monotonic() > until:
                        call.error = f"late: no reply within {self.deadline:g} seconds"
                        break
                    if not self._pull(calls):
                        time.sleep(POLL)
                call.drop()
                yield self._reply(call)
        finally:
            for call in calls:
                call.drop()

    def _connected(self, client: int, until: float) -> Mapping[int, int]:
        """The nodes that there are, once the client is among them or it is too late."""
        while client not in (nodes := self.nodes()) and time.monotonic() < until:
            time.sleep(POLL)
        return nodes

    def _feed(self, call: _Call) -> None:
        """Send as many messages as may be on their way."""
        while call.error is None and call.ahead and len(call.waiting) < AHEAD:
            offset, total = call.ahead.popleft()
            self._push(call, call.frame.read(offset, self.chunk_bytes) if total else b"", offset=offset, total=total)
            if not call.ahead:
                call.drop()

    def _push(self, call: _Call, piece: bytes, **place: int) -> None:
        from flwr.app import Message

        about: Config = {**self.about, **place, "action": call.action, "transfer": call.transfer}
        about |= {"room": self.chunk_bytes, "counted": call.counted}
        if call.client < len(self.names):
            about["site"] = self.names[call.client]
        message = Message(
            pack(piece, **about),
            dst_node_id=call.node,
            message_type="train",
            ttl=self.deadline + GRACE,
            group_id=str(call.round),
        )
        for id in self.grid.push_messages([message]):
            if not id:
                call.error = "the engine did not take the message"
            else:
                call.waiting.add(id)

    def _pull(self, calls: list[_Call]) -> bool:
        """Take in what has come, one message in memory at a time; whether there was any."""
        found = False
        for call in calls:
            for id in [] if call.done else sorted(call.waiting):
                for message in self.grid.pull_messages([id]):
                    found = True
                    call.waiting.discard(id)
                    try:
                        self._take(call, message)
                    except (ValueError, OSError) as error:
                        call.error = shown(f"{type(error).__name__}: {error}", SHOWN)
                self._feed(call)
                if call.done:
                    call.seconds = time.monotonic() - call.began
                    break
        return found

    def _take(self, call: _Call, message: Message) -> None:
        if message.has_error():
            reason = shown(message.error.reason or "no reason", SHOWN)
            call.error = f"the engine reports: {reason} (code {message.error.code})"
            return
        if message.metadata.src_node_id != call.node:
            raise ValueError(f"node {message.metadata.src_node_id} answers for client {call.client}")
        piece, about = unpack(message.content)
        if about.get("error"):
            call.error = shown(str(about["error"]), SHOWN)
            return
        if of(about, "transfer", str) != call.transfer:
            raise ValueError("an answer to another frame")
        total = of(about, "total")
        if total == 0:
            return  # a piece was taken in, and there is more to come from here
        offset = of(about, "offset")
        assert isinstance(total, int)
        assert isinstance(offset, int)
        if not 0 < total <= call.max_bytes:
            raise ValueError(f"a reply of {total} bytes, beyond the cap of {call.max_bytes}")
        if call.total is None:
            call.total = total
            first = len(piece)
            if offset != 0 or not 0 < first <= total:
                raise ValueError("a reply that does not begin at its beginning")
            call.ahead.extend((start, 0) for start in range(first, total, self.chunk_bytes))
        if total != call.total or offset in call.got or offset + len(piece) > total:
            raise ValueError("pieces of a reply that do not fit together")
        call.got[offset] = len(piece)
        if total <= SPOOL_ABOVE and len(piece) == total:
            call.small = piece
            return
        if call.file is None:
            with tempfile.NamedTemporaryFile(dir=self.spool, suffix=".frame", delete=False) as file:
                call.file = Path(file.name)
        with call.file.open("r+b") as file:
            file.seek(offset)
            file.write(piece)

    def _reply(self, call: _Call) -> Reply:
        seconds = call.seconds or time.monotonic() - call.began
        if call.error is not None or call.total is None:
            if call.file is not None:
                call.file.unlink(missing_ok=True)
            return Reply(call.client, None, seconds, call.error or "no reply")
        frame = Frame(call.small) if call.file is None else Frame.in_file(call.file, call.total)
        try:
            header = frame.header()
        except WireError:
            return Reply(call.client, frame, seconds)  # the round will report what is wrong
        if header.round != call.round:
            return Reply(call.client, None, seconds, f"Illegal: a replayed reply of round {header.round}")
        return Reply(call.client, frame, seconds)
