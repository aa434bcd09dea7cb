"""One client's frame on its way, and the pieces of its reply, which are checked as they come."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from thinwire.federation.engine import Answer, of
from thinwire.runtime.round import Reply, shown
from thinwire.wire import Frame, WireError
from thinwire.wire.frame import SPOOL_ABOVE

SHOWN = 200  # characters of an error that are kept
NOTHING = Frame(b"")


@dataclass
class Call:
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
    piece: int  # bytes of it that are asked for at a time
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

    def lose(self) -> None:
        """Remove the frame, and what there is of a reply."""
        self.drop()
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def take(self, answer: Answer, spool: Path) -> None:
        """Take in an answer; ValueError for one that is not to this frame, or does not fit what came before."""
        if answer.error is not None:
            self.error = f"the engine reports: {shown(answer.error, SHOWN)}"
            return
        if answer.node != self.node:
            raise ValueError(f"node {answer.node} answers for client {self.client}")
        piece, about = answer.piece, answer.about or {}
        if about.get("error"):
            self.error = shown(str(about["error"]), SHOWN)
            return
        if of(about, "transfer", str) != self.transfer:
            raise ValueError("an answer to another frame")
        total = of(about, "total")
        if total == 0:
            return  # a piece was taken in, and there is more to come from here
        offset = of(about, "offset")
        assert isinstance(total, int)
        assert isinstance(offset, int)
        if not 0 < total <= self.max_bytes:
            raise ValueError(f"a reply of {total} bytes, beyond the cap of {self.max_bytes}")
        if self.total is None:
            self.total = total
            first = len(piece)
            if offset != 0 or not 0 < first <= total:
                raise ValueError("a reply that does not begin at its beginning")
            self.ahead.extend((start, 0) for start in range(first, total, self.piece))
        if total != self.total or offset in self.got or offset + len(piece) > total:
            raise ValueError("pieces of a reply that do not fit together")
        self.got[offset] = len(piece)
        if total <= SPOOL_ABOVE and len(piece) == total:
            self.small = piece
            return
        if self.file is None:
            with tempfile.NamedTemporaryFile(dir=spool, suffix=".frame", delete=False) as file:
                self.file = Path(file.name)
        with self.file.open("r+b") as file:
            file.seek(offset)
            file.write(piece)

    @property
    def reply(self) -> Reply:
        """What a round makes of it."""
        seconds = self.seconds or time.monotonic() - self.began
        if self.error is not None or self.total is None:
            self.lose()
            return Reply(self.client, None, seconds, self.error or "no reply")
        frame = Frame(self.small) if self.file is None else Frame.in_file(self.file, self.total)
        try:
            header = frame.header()
        except WireError:
            return Reply(self.client, frame, seconds)  # the round will report what is wrong
        if header.round != self.round:
            return Reply(self.client, None, seconds, f"Illegal: a replayed reply of round {header.round}")
        return Reply(self.client, frame, seconds)
