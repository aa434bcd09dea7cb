"""A small federation in memory: a tiny net, clients with rows, and rounds that tests can disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiny import CHOICES, tiny_folder, tiny_rows

from thinwire.aggregate.weights import Agreement, Weighing
from thinwire.core import Client, Method, Metrics, Server
from thinwire.data.batch import Dataset
from thinwire.data.templates import Template
from thinwire.data.tokenise import tokenise
from thinwire.evaluate.loss import mean_loss
from thinwire.keys import Key
from thinwire.model.net import Net
from thinwire.model.personal import at_home
from thinwire.runtime.endpoint import ACTIONS, Action, Endpoint
from thinwire.runtime.inprocess import InProcess
from thinwire.runtime.round import Reply, Round, RoundFunction, run_round
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import ClientMemories, VersionStore
from thinwire.wire import Frame
from thinwire.wire.frame import header_room

PROMPT = Template("{input}: it was", " {output}")
Tamper = Callable[[int, Frame], Frame | None]


def tiny_net(folder: Path, dtype: str = "float32", remember: bool = True, **overrides: Any) -> Net:
    """A net on a random tiny Llama saved under `folder`."""
    if not (folder / "config.json").exists():
        tiny_folder(folder, **overrides)
    return Net.open(str(folder), dtype, remember=remember)


def closed_data(net: Net, rows: int, seed: int) -> Dataset:
    """A closed set of two answers, distinguished by one word of the prompt."""
    return tokenise(tiny_rows(rows, seed, closed=True), PROMPT, net.tokenizer, max_length=64, choices=CHOICES)


@dataclass
class Federation:
    """Rounds of one method over a few clients, state by state."""

    method: Method
    net: Net
    folder: Path
    rounds: int = 4
    sizes: tuple[int, ...] = (12, 8, 16)
    seed: int = 0
    tamper: Tamper | None = None  # changes a reply's frame on its way, None: loses it
    watch: Callable[[Frame], None] = lambda frame: None  # sees each frame, as it is sent and as it comes
    before_client: Callable[[Net], None] = lambda net: None
    spool: Path | None = None
    public: Dataset | None = None  # the server's own rows
    state: Any = None
    round: int = 0
    held: dict[int, str] = field(default_factory=dict)
    caps: dict[int, int] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)
    agreement: Agreement | None = None  # who counts how much
    actions: Mapping[str, Action] = field(default_factory=dict)  # beside, or in place of, joining and training
    function: RoundFunction = run_round
    metrics: Metrics = field(default_factory=dict)
    history: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = [closed_data(self.net, rows, 100 + i) for i, rows in enumerate(self.sizes)]
        self.key = Key.root(self.seed)
        self.versions = VersionStore(self.folder / "versions", 3)
        self.memories = ClientMemories(self.folder / "clients")
        if self.state is None:
            self.state = self.method.init(self.server(0, ()))

    @property
    def seats(self) -> Seats:
        """Of the present parts: a test may put others in their place."""
        parts = (self.net, self.versions, self.data, self.memories)
        loss = None if self.public is None else lambda: mean_loss(self.net.model, self.public, 16)[0]
        return Seats(self.key, self.rounds, *parts, self._held, self.public, loss=loss)

    def _held(self, client: int, round: int) -> str | None:
        """Asked for whenever a client is seated."""
        self.before_client(self.net)
        return self.held.get(client)

    def server(self, round: int, cohort: Iterable[int]) -> Server:
        """The server half's context in that round."""
        return self.seats.server(round, tuple(cohort))

    def client(self, id: int, round: int) -> Client:
        """The client half's context in that round."""
        return self.seats.client(id, round)

    def step(self, cohort: Iterable[int] | None = None) -> Round:
        """One round; its record."""
        self.round += 1
        cohort = tuple(range(len(self.sizes))) if cohort is None else tuple(cohort)
        inner = InProcess(Endpoint(self.method, self.seats, {**ACTIONS, **self.actions}, spool=self.spool))
        transport = Tampered(inner, self.tamper, self.watch)
        names = [f"client-{i}" for i in range(len(self.sizes))]
        server = replace(self.server(self.round, cohort), weighing=Weighing(self.agreement, names))
        at = Round(1, server, transport, self.held, self.spool)
        at.max_header = header_room(self.method.Up, self.net.names)
        at.caps, at.examples = self.caps, self.examples
        self.state, self.metrics = self.function(self.method, self.state, at)
        self.history.append(at)
        return at

    def sent_next(self, *clients: int) -> list[Any]:
        """What each of them is sent in the next round; who follows it holds the bits and the version of the state."""
        self.method.materialise(self.state, self.net)
        round, meant, downs = self.round + 1, self.net.state_sha256(), []
        for id in clients:
            downs.append(self.method.broadcast(self.state, self.server(round, clients), id, self.held.get(id)))
            self.net.forget()
            client = self.client(id, round)
            self.method.receive(downs[-1], client)
            assert self.net.state_sha256() == meant
            assert client.held == self.state.version
        return downs

    def run(self, rounds: int | None = None) -> Federation:
        """All the rounds that are left, or so many."""
        for _ in range(rounds if rounds is not None else self.rounds - self.round):
            self.step()
        return self

    def fall(self) -> float:
        """How far all the rounds lower the loss of client 0, with what stays there."""
        self.method.materialise(self.state, self.net)
        before, _ = mean_loss(self.net.model, self.data[0], 16)
        self.run()
        self.method.materialise(self.state, self.net)
        with at_home(self.net, self.client(0, self.rounds + 1).memory, remember=False):
            after, _ = mean_loss(self.net.model, self.data[0], 16)
        return before - after


class Tampered:
    """A transport whose replies pass through `tamper`, and whose frames `watch` sees."""

    def __init__(self, inner: InProcess, tamper: Tamper | None, watch: Callable[[Frame], None]) -> None:
        self.inner, self.tamper, self.watch = inner, tamper, watch

    def again(self, client: int, frame: Frame) -> Reply:
        """See round.Transport."""
        (reply,) = self.exchange([(client, frame)])
        return reply

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        """See round.Transport."""

        def sent() -> Iterator[tuple[int, Frame]]:
            for client, frame in frames:
                self.watch(frame)
                yield client, frame

        for reply in self.inner.exchange(sent(), action):
            if reply.frame is not None:
                self.watch(reply.frame)
            if self.tamper is None or reply.frame is None:
                yield reply
            else:
                frame = self.tamper(reply.client, reply.frame)
                yield Reply(reply.client, frame, reply.seconds, None if frame is not None else "lost")
