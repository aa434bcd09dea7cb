"""The core: a federated method is five hooks, both halves in one file, and nothing but frames passes between them.

    state -broadcast-> Down -encode-> [bytes] -transport-> [bytes] -decode-> Down -client_update-> Up
      ^                                 '---- ledger ----'                                          |
      '--aggregate---- Up <-decode-- [bytes] <--- transport --- [bytes] <---------encode------------'
    state -materialise-> net

Hooks are pure at the boundary: randomness comes from a key, memory from the arguments. `aggregate` may consume its
state once its replies are exhausted. Replies come lazily, in cohort order, and large ones one at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from thinwire import wire
from thinwire.aggregate.mean import Counted, Mean, Metrics, Update
from thinwire.aggregate.server_step import AnyServerStep, Plain
from thinwire.keys import Key
from thinwire.privacy.released import Released, check_released
from thinwire.privacy.secrets import Secrets, SystemSecrets
from thinwire.wire import Frame, Illegal, Ledger, Spooled, Stale, WireError
from thinwire.wire.legal import MOST, check_report

if TYPE_CHECKING:
    from torch import Tensor

    from thinwire.data.batch import Dataset
    from thinwire.model.net import Net

LOG = logging.getLogger("thinwire")
REASON = 500  # characters of why a client has no reply that are kept


class Versions(Protocol):
    """Content-addressed named tensors: a bounded number of versions of the global weights."""

    def put(self, tensors: Mapping[str, Tensor]) -> str: ...

    def get(self, version: str) -> Mapping[str, Tensor] | None: ...


@dataclass(frozen=True)
class Server:
    """All that the server half may touch. `round` counts from 1; it is 0 in `init`."""

    net: Net
    key: Key
    round: int
    rounds: int
    cohort: tuple[int, ...]
    versions: Versions
    data: Dataset | None = None  # public data, never a client's


@dataclass
class Client:
    """All that the client half may touch.

    `net` is a borrowed workspace, its contents undefined on entry: fill it from `down`. `memory` survives rounds and
    stays here. `held` is the version of the global weights that this client holds: the half sets it, it travels in the
    reply's header, and the next `broadcast` is given it. `secrets` is for what no key may repeat: a private run's noise
    and sampling.
    """

    id: int
    net: Net
    data: Dataset
    key: Key
    memory: MutableMapping[str, Tensor]
    versions: Versions
    held: str | None = None
    secrets: Secrets = field(default_factory=SystemSecrets)


class StaleVersion(Exception):
    """Raised by a client half whose `down` builds on a version that it does not hold."""


class Method(BaseModel):
    """One federated algorithm. Its fields are its hyper-parameters; it holds nothing else.

    `Down`, `Up` and `State` are payload classes (see thinwire.wire.payload). An `Up` with the fields `examples` and
    `loss` has them in the run's records.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    Down: ClassVar[type]
    Up: ClassVar[type]
    State: ClassVar[type]
    paper: ClassVar[str] = ""
    hollow: ClassVar[bool] = False  # the client half needs the net's names, config and base, and not its weights
    versions_each: ClassVar[int] = 0  # versions of their own that the server keeps for each client

    def init(self, server: Server) -> Any:
        """The state before the first round."""
        raise NotImplementedError

    def broadcast(self, state: Any, server: Server, client_id: int, held: str | None) -> Any:
        """What this client is told; `held` is the version that it says it has, None for a newcomer."""
        raise NotImplementedError

    def client_update(self, down: Any, client: Client) -> Any:
        """What the client does with it, and answers; raises StaleVersion if it cannot build on `down`."""
        raise NotImplementedError

    def aggregate(self, state: Any, server: Server, replies: Iterable[tuple[int, Any]]) -> tuple[Any, Metrics]:
        """How the answers change the state; also called where no client answered."""
        raise NotImplementedError

    def materialise(self, state: Any, net: Net) -> None:
        """weights := state."""
        raise NotImplementedError

    def check(self, state: Any, client_id: int, up: Any) -> None:
        """Raise Illegal if this client may not answer so. A bad reply drops the client for the round."""

    def reply_bytes(self, net: Net) -> int:
        """The most bytes that a reply's tensors take, longer are not read; by default twice the float32 weights."""
        return 8 * net.size + 256 * len(net.names) + (1 << 16)

    def passes(self) -> float:
        """Rows that a visit passes forward through the model, a backward pass counted as two; NaN if not known."""
        return math.nan

    def released(self, privacy: Any) -> Released | None:
        """In what state each field of `Up` leaves a run with that privacy; None: the method offers none."""
        return None

    def receive(self, down: Any, client: Client) -> None:
        """Fill the client's net as `down` means it, without training: for evaluation at the clients."""
        raise NotImplementedError(f"{type(self).__name__} does not evaluate at the clients")


class Averaged(Method):
    """A method whose server moves along the mean of what its clients' replies add: `update` and `step` are its own."""

    weighting: Literal["examples", "uniform"] = "examples"
    aggregation: Mean = Mean()
    server_step: AnyServerStep = Plain()

    def update(self, state: Any, server: Server, up: Any) -> Update:
        """What a legal reply adds: the one place where it is decoded for the mean, tensor by tensor."""
        raise NotImplementedError

    def step(
        self, state: Any, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Any, Metrics]:
        """What the mean, float32 by name, does to the state; `counted` has each client whose reply is in it."""
        raise NotImplementedError

    def aggregate(self, state: Any, server: Server, replies: Iterable[tuple[int, Any]]) -> tuple[Any, Metrics]:
        counted: list[Counted] = []

        def updates() -> Iterator[tuple[int, Update]]:
            for client, up in replies:
                update = self.update(state, server, up)
                counted.append(Counted(client, update.weight, update.metrics))
                yield client, update
                del up, update  # large ones are gone before the next one comes

        mean, metrics = self.aggregation(updates())
        if not mean:
            return state, {}
        state, own = self.step(state, server, mean, counted)
        return state, metrics | own

    def weight(self, up: Any) -> float:
        """How much a reply counts in the mean."""
        return up.examples if self.weighting == "examples" else 1


@dataclass(frozen=True)
class Reply:
    """What a transport brings back: the frame, or None with the reason why there is none."""

    client: int
    frame: Frame | None
    seconds: float = 0.0
    error: str | None = None


class Transport(Protocol):
    """Carries frames. Knows no tensor, no method, no model."""

    def exchange(self, frames: Iterable[tuple[int, Frame]]) -> Iterator[Reply]:
        """Deliver each frame to its client; yield the replies in the order of the frames, as they are asked for."""
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


@dataclass
class Round:
    """Where a round takes place: what it runs on, and what it leaves behind.

    `caps`: client -> the most examples that a reply of it may claim, where that is known. `examples`: client -> the
    number that its first reply gave, which no later one can raise: it says how much a client counts.
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
    ledger: Ledger = field(default_factory=Ledger)
    visits: dict[int, Visit] = field(default_factory=dict)


def serve(
    method: Method,
    frame: Frame,
    client: Client,
    spool: Path | None = None,
    max_bytes: int = wire.frame.MAX_FRAME,
    privacy: Any = None,
) -> Frame:
    """A client, seen from outside: bytes in, bytes out. Raises WireError for a frame that it cannot use.

    In a private run RuntimeError for a reply that may not leave, see privacy.released.
    """
    header = wire.peek(frame)
    if header.client != client.id:
        raise Illegal(f"a frame for client {header.client} was given to client {client.id}")
    down: Any = wire.decode(method.Down, frame, max_bytes)
    try:
        up = method.client_update(down, client)
        if privacy is not None:
            check_released(up, method.released(privacy))
    except StaleVersion:
        up = Stale(client.held)
    return wire.encode(up, run=header.run, round=header.round, client=client.id, held=client.held, spool=spool)


def run_round(method: Method, state: Any, at: Round) -> tuple[Any, Metrics]:
    """One round of the server, and the only place where bytes are counted.

    `at.visits` then has one record a client of the cohort, `at.held` the versions that the clients said they hold.
    """

    def frame_for(client: int, held: str | None) -> Frame:
        down = method.broadcast(state, at.server, client, held)
        frame = wire.encode(down, run=at.run, round=at.server.round, client=client, spool=at.spool)
        return at.ledger.down(client, frame)

    def ask(clients: Sequence[int], held: Mapping[int, str]) -> Iterator[Reply]:
        for reply in at.transport.exchange((c, frame_for(c, held.get(c))) for c in clients):
            at.visits[reply.client].seconds += reply.seconds
            yield reply

    def answers() -> Iterator[tuple[int, Any]]:
        for group in _groups(ask(at.server.cohort, dict(at.held))):
            frames: list[tuple[int, Frame]] = []
            for reply in group:
                if reply.frame is not None and _is_stale(at.ledger.up(reply.client, reply.frame), at.max_header):
                    at.held.pop(reply.client, None)
                    _remove(reply.frame)
                    reply = next(ask([reply.client], {}))  # once more, with nothing taken for granted
                    if reply.frame is not None:
                        at.ledger.up(reply.client, reply.frame)
                if reply.frame is None:
                    at.visits[reply.client].error = shown(reply.error or "no reply")
                else:
                    frames.append((reply.client, reply.frame))
            # step by step for the whole group, which takes a CPU half the time that it takes reply by reply
            ups = [_tried(decode, client, frame) for client, frame in frames]
            ups = [_tried(check, client, up) for (client, _), up in zip(frames, ups, strict=True)]
            for (client, frame), up in zip(frames, ups, strict=True):
                visit = at.visits[client]
                try:
                    if isinstance(up, Exception):
                        if not isinstance(up, WireError):
                            where = f"round {at.server.round}, client {client}: its reply cannot be used"
                            LOG.error(where, exc_info=up)
                        visit.error = shown(f"{type(up).__name__}: {up}")
                        continue
                    held = wire.peek(frame, at.max_header).held
                    if held is not None:
                        at.held[client] = held
                    visit.examples, visit.loss = getattr(up, "examples", None), getattr(up, "loss", None)
                    yield client, up
                finally:
                    _remove(frame)

    def decode(client: int, frame: Frame) -> Any:
        header = wire.peek(frame, at.max_header)
        if (header.run, header.round, header.client) != (at.run, at.server.round, client):
            raise Illegal(f"a reply of run {header.run}, round {header.round}, client {header.client}")
        return wire.decode(method.Up, frame, at.max_bytes, at.max_header)

    def check(client: int, up: Any) -> Any:
        if isinstance(up, Exception):
            return up
        check_report(up, at.caps.get(client, MOST))
        method.check(state, client, up)
        if (claimed := getattr(up, "examples", None)) is None:
            return up
        first = at.examples.setdefault(client, claimed)
        return up if claimed <= first else replace(up, examples=first)

    at.visits.update({client: Visit(client) for client in at.server.cohort})
    state, metrics = method.aggregate(state, at.server, answers())
    for client, visit in at.visits.items():
        visit.bytes_down = at.ledger.sent.get(client, 0)
        visit.bytes_up = at.ledger.received.get(client, 0)
    return state, metrics


def _groups(replies: Iterator[Reply]) -> Iterator[list[Reply]]:
    """The replies, small ones by the dozen, and each large one alone: a mean holds one update at a time."""
    group: list[Reply] = []
    for reply in replies:
        large = reply.frame is not None and len(reply.frame) > wire.frame.SMALL
        if group and (large or len(group) == wire.frame.KEPT):
            yield group
            group = []
        group.append(reply)
        if large:
            yield group
            group = []
    if group:
        yield group


def _tried(hook: Callable[..., Any], *args: Any) -> Any:
    """What the hook returns, or what it raises on a reply: that is its client's, and ends no run."""
    try:
        return hook(*args)
    except OSError:  # this machine's disk or its handles: no client has a part in it
        raise
    except Exception as error:
        return error


def shown(reason: str) -> str:
    """A reason that came from elsewhere as one line: no control characters, REASON characters at most."""
    line = "".join(mark if mark.isprintable() else " " for mark in reason[: 2 * REASON])
    line = " ".join(line.split())
    return line if len(line) <= REASON else line[: REASON - 3] + "..."


def _is_stale(frame: Frame, max_header: int) -> bool:
    try:
        return wire.peek(frame, max_header).kind == Stale.__name__
    except WireError:
        return False  # decoding it will say what is wrong


def _remove(frame: Frame) -> None:
    if isinstance(frame, Spooled):
        frame.remove()
