"""A round of the server: frames out, replies in, all of them counted; and what carries them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from thinwire import wire
from thinwire.aggregate.mean import Metrics
from thinwire.core import Method, Server
from thinwire.wire import Frame, Illegal, Ledger, Stale, WireError
from thinwire.wire.legal import MOST, check_report

LOG = logging.getLogger("thinwire")
SMALL = 1 << 16  # bytes of a reply up to which it is worked on together with others, GROUP at most
GROUP = 32
REASON = 500  # characters of why a client has no reply that are kept


@dataclass(frozen=True)
class Reply:
    """What a transport brings back: the frame, or None with the reason why there is none."""

    client: int
    frame: Frame | None
    seconds: float = 0.0
    error: str | None = None


class Transport(Protocol):
    """Carries frames. Knows no tensor, no method, no model."""

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        """Deliver each frame to its client for an action; yield the replies in the frames' order, when asked for."""
        ...

    def again(self, client: int, frame: Frame) -> Reply:
        """Another frame to a client whose reply has come, within its round's `train`: the reply that counts."""
        ...

    def under_way(self, members: Collection[int]) -> Collection[int]:
        """Whose reply to the last round is still waited for: the next round's `train` yields them after its own.

        `members`: who belongs to the run now; the reply of another is waited for no more, as if it were lost.
        """
        ...


@dataclass
class Visit:
    """The record of one client in one round."""

    client: int
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    examples: int | None = None
    loss: float | None = None
    error: str | None = None
    left_out: str | None = None  # why a legal reply is not in what the round made
    late: int | None = None  # how many rounds ago it was asked for
    bytes_keys: int | None = None  # of both ways, that are key material


@dataclass
class Round:
    """Where a round takes place: what it runs on, and what it leaves behind.

    `caps`: client -> the most examples that a reply of it may claim, where that is known. `examples`: client -> the
    number that its first reply gave, which no later one can raise: by it a client counts. `seen` is given
    each reply that counts and is of this round, with its client.
    """

    run: int
    server: Server
    transport: Transport
    held: dict[int, str]
    spool: Path | None = None
    max_bytes: int = wire.frame.MAX_FRAME
    max_header: int = wire.frame.MAX_HEADER
    caps: Mapping[int, int] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)
    seen: Callable[[int, Any], None] = lambda client, up: None
    ledger: Ledger = field(default_factory=Ledger)
    visits: dict[int, Visit] = field(default_factory=dict)


RoundFunction = Callable[[Method, Any, Round], tuple[Any, Metrics]]  # a round of the server: state -> state


def run_round(method: Method, state: Any, at: Round) -> tuple[Any, Metrics]:
    """One round of the server, and the only place where bytes are counted.

    `at.visits` then has one record a client of the cohort, `at.held` the versions that the clients reported to hold.
    Who is in `at.server.late` is busy with an earlier round: it is not asked, and its reply is read as that round's.
    """
    late = at.server.late

    def frame_for(client: int, held: str | None) -> Frame:
        down = method.broadcast(state, at.server, client, held)
        frame = wire.encode(down, run=at.run, round=at.server.round, client=client, spool=at.spool)
        return at.ledger.down(client, frame)

    kept: list[Frame] = []  # until the round has ended, where all replies are read at once, or shares follow from all
    keeps = method.keeps_all or at.server.weighing.keeps_all

    def taken(reply: Reply) -> Reply:
        at.visits[reply.client].seconds += reply.seconds
        if reply.frame is not None:
            at.ledger.up(reply.client, reply.frame)
        return reply

    def answers() -> Iterator[tuple[int, Any]]:
        known = dict(at.held)
        free = (client for client in at.server.cohort if client not in late)
        asked = ((client, frame_for(client, known.get(client))) for client in free)
        for group in groups(at.transport.exchange(asked)):
            frames: list[tuple[int, Frame]] = []
            for reply in map(taken, group):
                if reply.frame is not None and reply.client not in late and is_stale(reply.frame, at.max_header):
                    at.held.pop(reply.client, None)
                    reply.frame.remove()
                    # once more, with nothing taken for granted
                    reply = taken(at.transport.again(reply.client, frame_for(reply.client, None)))
                if reply.frame is None:
                    at.visits[reply.client].error = shown(reply.error or "no reply")
                else:
                    frames.append((reply.client, spooled(reply.client, reply.frame) if keeps else reply.frame))
            # step by step for the whole group, which takes a CPU half the time that it takes reply by reply
            ups = [_or_error(decode, client, frame) for client, frame in frames]
            ups = [_or_error(check, client, up) for (client, _), up in zip(frames, ups, strict=True)]
            for (client, frame), up in zip(frames, ups, strict=True):
                visit = at.visits[client]
                try:
                    if isinstance(up, Exception):
                        if not isinstance(up, WireError):
                            where = f"round {at.server.round}, client {client}: its reply cannot be used"
                            LOG.error(where, exc_info=up)
                        visit.error = shown(f"{type(up).__name__}: {up}")
                        continue
                    held = frame.header(at.max_header).held
                    if held is not None:
                        at.held[client] = held
                    visit.examples, visit.loss = getattr(up, "examples", None), getattr(up, "loss", None)
                    if client not in late:
                        at.seen(client, up)
                    if keeps:
                        kept.append(frame)
                    yield client, up
                finally:
                    if frame not in kept:
                        frame.remove()

    def spooled(client: int, frame: Frame) -> Frame:
        """The frame in a file, unless it is small: all of a round in memory would be a model a client."""
        if at.spool is None or len(frame) <= SMALL:
            return frame
        place = at.spool / f"{at.server.round}-{client}.frame"
        frame.move_to(place)
        return Frame.in_file(place)

    def decode(client: int, frame: Frame) -> Any:
        header = frame.header(at.max_header)
        if (header.run, header.round, header.client) != (at.run, at.server.asked(client, state)[1].round, client):
            raise Illegal(f"a reply of run {header.run}, round {header.round}, client {header.client}")
        return wire.decode(method.Up, frame, at.max_bytes, at.max_header)

    def check(client: int, up: Any) -> Any:
        if isinstance(up, Exception):
            return up
        check_report(up, at.caps.get(client, MOST))
        method.check(at.server.asked(client, state)[0], client, up)
        if (claimed := getattr(up, "examples", None)) is None:
            return up
        first = at.examples.setdefault(client, claimed)
        return up if claimed <= first else replace(up, examples=first)

    at.visits.update({client: Visit(client) for client in (*at.server.cohort, *late)})
    for client, (_, asked) in late.items():
        at.visits[client].late = at.server.round - asked.round
    server = replace(at.server, spool=at.spool)
    try:
        state, metrics = method.aggregate(state, server, answers())
    finally:
        for frame in kept:
            frame.remove()
    for client, visit in at.visits.items():
        visit.left_out = shown(server.left_out[client]) if client in server.left_out else None
        visit.bytes_down = at.ledger.sent.get(client, 0)
        visit.bytes_up = at.ledger.received.get(client, 0)
    return state, metrics


def groups(replies: Iterator[Reply]) -> Iterator[list[Reply]]:
    """The replies, small ones by the dozen, and each large one alone: a mean holds one update at a time."""
    group: list[Reply] = []
    for reply in replies:
        large = reply.frame is not None and len(reply.frame) > SMALL
        if group and (large or len(group) == GROUP):
            yield group
            group = []
        group.append(reply)
        if large:
            yield group
            group = []
    if group:
        yield group


def _or_error(hook: Callable[..., Any], *args: Any) -> Any:
    """What the hook returns, or what it raises on a reply: that is its client's, and ends no run."""
    try:
        return hook(*args)
    except OSError:  # this machine's disk or its handles: no client has a part in it
        raise
    except Exception as error:
        return error


def shown(text: str, most: int = REASON) -> str:
    """A text from elsewhere as one line of at most `most` characters, none of which steers a terminal."""
    line = " ".join("".join(mark if mark.isprintable() else " " for mark in text[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def is_stale(frame: Frame, max_header: int) -> bool:
    """Whether a reply says that its client does not hold what the frame builds on."""
    try:
        return frame.header(max_header).kind == Stale.__name__
    except WireError:
        return False  # decoding it will report what is wrong
