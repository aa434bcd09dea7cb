"""A client seen from outside: a frame and an action in, a frame out. The same wherever clients live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from thinwire import wire
from thinwire.core import Client, Method, StaleVersion
from thinwire.model.personal import at_home
from thinwire.privacy.released import check_released, withheld
from thinwire.runtime.payloads import Ready
from thinwire.runtime.seats import Seats
from thinwire.wire import Frame, Illegal, Stale

Action = Callable[[Method, Frame, Client, Path | None], Frame]  # the path: where large frames are kept


def serve(
    method: Method,
    frame: Frame,
    client: Client,
    spool: Path | None = None,
    max_bytes: int = wire.frame.MAX_FRAME,
) -> Frame:
    """The action `train`: the client half's reply. Raises WireError for a frame that it cannot use.

    In a private run the reply is without what it reports beside its update; RuntimeError for one that may not leave:
    see privacy.released.
    """
    header = frame.header()
    if header.client != client.id:
        raise Illegal(f"a frame for client {header.client} was given to client {client.id}")
    _, up = visit(method, frame, client, max_bytes)
    return wire.encode(up, run=header.run, round=header.round, client=client.id, held=client.held, spool=spool)


def visit(method: Method, frame: Frame, client: Client, max_bytes: int = wire.frame.MAX_FRAME) -> tuple[Any, Any]:
    """What the frame brings down, and what the client half makes of it."""
    down: Any = wire.decode(method.Down, frame, max_bytes)
    try:
        with client.together(frame):
            up = method.client_update(down, client)
        if client.protection is not None:
            released = method.released(client.protection.level)
            up = withheld(up, released or {})
            check_released(up, released)
    except StaleVersion:
        return down, Stale(client.held)
    return down, up


def join(method: Method, frame: Frame, client: Client, spool: Path | None = None) -> Frame:
    """The action `join`: the client's model and rows are there."""
    header = frame.header()
    return wire.encode(Ready(), run=header.run, round=header.round, client=client.id)


KEYED = ("keys", "shares", "unmask")  # the actions of secure sums that carry key material: kept nowhere
ACTIONS: Mapping[str, Action] = {"join": join, "train": serve}


class Endpoint:
    """The clients of a run at one place. `done(client)` is called when a client has answered, its memory kept.

    The actions in PASSING leave no trace: a client is then as it will be when the next round begins. In all of them the
    net has the client's own personal parameters.
    """

    PASSING = ("join", "evaluate", *KEYED)

    def __init__(
        self,
        method: Method,
        seats: Seats,
        actions: Mapping[str, Action],
        done: Callable[[Client], None] = lambda client: None,
        spool: Path | None = None,
    ) -> None:
        self.method, self.seats, self.actions, self.done, self.spool = method, seats, dict(actions), done, spool

    def answer(self, action: str, frame: Frame) -> Frame:
        """The reply of the client that the frame is for; raises WireError for a frame that it cannot use."""
        header, passing = frame.header(), action in self.PASSING
        client = self.seats.client(header.client, header.round + passing)
        with at_home(client.net, client.memory, remember=not passing):
            reply = self.actions[action](self.method, frame, client, self.spool)
        if not passing:
            if self.seats.memories is not None:
                self.seats.memories.commit(client.memory, client.id)
            self.done(client)
        return reply
