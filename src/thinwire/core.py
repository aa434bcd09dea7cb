"""The core: a federated method is five hooks, both halves in one file, and nothing but frames passes between them.

    state -broadcast-> Down -encode-> [bytes] -transport-> [bytes] -decode-> Down -client_update-> Up
      ^                                 '---- ledger ----'                                          |
      '--aggregate---- Up <-decode-- [bytes] <--- transport --- [bytes] <---------encode------------'
    state -materialise-> net

Hooks are pure at the boundary: randomness comes from a key, memory from the arguments. `aggregate` may consume its
state once its replies are exhausted. Replies come lazily, in cohort order, and large ones one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from thinwire.aggregate.linear import Linear
from thinwire.aggregate.mean import Counted, Mean, Metrics, Setting, Update
from thinwire.aggregate.noised import Noised
from thinwire.aggregate.robust import AnyAggregation
from thinwire.aggregate.server_step import AnyServerStep, Plain
from thinwire.aggregate.weights import Weighing
from thinwire.costs.sketch import Work
from thinwire.errors import ConfigError
from thinwire.keys import Key
from thinwire.privacy.protection import Level, Protection
from thinwire.privacy.released import Released, of_update
from thinwire.privacy.secrets import Secrets, SystemSecrets
from thinwire.privacy.secure import Secure
from thinwire.versions import Trial, Versions
from thinwire.wire import Together, alone

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from thinwire.costs.frames import Expected, Frames
    from thinwire.costs.memory import Memory, Side
    from thinwire.costs.sketch import Pass, Sketch
    from thinwire.data.batch import Dataset
    from thinwire.model.net import Net


@dataclass(frozen=True)
class Server:
    """All that the server half may touch. `round` counts from 1; it is 0 in `init`.

    `loss`: of the weights in its net, on its rows. `spool`: a folder for what is too large for memory. `left_out`:
    client -> why its reply is not in what the round makes, for the records.
    """

    net: Net
    key: Key
    round: int
    rounds: int
    cohort: tuple[int, ...]
    versions: Versions
    data: Dataset | None = None  # public data, never a client's
    clients: int = 0  # of the run, in the cohort or not; 0: not known
    loss: Callable[[], float] | None = None
    spool: Path | None = None
    left_out: dict[int, str] = field(default_factory=dict)
    weighing: Weighing = field(default_factory=Weighing)  # how much each reply counts
    protection: Protection | None = None  # of whole clients: what a private run's mean is noised with
    secrets: Secrets = field(default_factory=SystemSecrets)
    late: Mapping[int, tuple[Any, Server]] = field(default_factory=dict)  # client -> state and context of its round
    lengths: Sequence[float] = ()  # of each earlier round the median of its updates', where its metrics have it

    def asked(self, client: int, state: Any) -> tuple[Any, Server]:
        """In what a client was asked: in the round's state, and here, unless its reply is late."""
        return self.late.get(client, (state, self))


@dataclass
class Client:
    """All that the client half may touch.

    `net` is a borrowed workspace, its contents undefined on entry: fill it from `down`. `memory` survives rounds and
    stays here. `held` is the version of the global weights that this client holds: the half sets it, it travels in the
    reply's header, and the next `broadcast` is given it. `secrets`: for a private run's noise and sampling.
    """

    id: int
    net: Net
    data: Dataset
    key: Key
    memory: MutableMapping[str, Tensor]
    versions: Versions
    held: str | None = None
    secrets: Secrets = field(default_factory=SystemSecrets)
    protection: Protection | None = None  # in a private run: of its examples, or of all that it sends
    together: Together = alone  # has its other processes, if there are any, work on this frame too


class StaleVersion(Exception):
    """Raised by a client half whose `down` builds on a version that it does not hold."""


class Method(BaseModel):
    """One federated algorithm. Its fields are its hyper-parameters; it holds nothing else.

    `Down`, `Up`, `State`: payload classes (see thinwire.wire.payload); `examples`, `loss` of an `Up` stand in records.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    Down: ClassVar[type]
    Up: ClassVar[type]
    State: ClassVar[type]
    paper: ClassVar[str] = ""
    leaves_last: ClassVar[bool] = False  # its client half does not make its last move, which nobody would see there
    hollow: ClassVar[bool] = False  # the client half needs the net's names, config and base, and not its weights
    needs_weights: ClassVar[bool] = True  # whether the server half needs more than those of the net before the end
    keeps: ClassVar[bool] = False  # its client half trains what a view keeps at the clients too
    classes_only: ClassVar[bool] = False  # works with a closed set of answers alone
    versions_each: ClassVar[int] = 0  # versions of their own that the server keeps for each client
    private: ClassVar[tuple[Level, ...]] = ()  # levels at which its replies can be noised, or its mean

    def init(self, server: Server) -> Any:
        """The state before the first round."""
        raise NotImplementedError

    def broadcast(self, state: Any, server: Server, client_id: int, held: str | None) -> Any:
        """What this client receives; `held` is the version that it reports to hold, None for a newcomer."""
        raise NotImplementedError

    def client_update(self, down: Any, client: Client) -> Any:
        """The client's reply to it; raises StaleVersion if it cannot build on `down`."""
        raise NotImplementedError

    def aggregate(self, state: Any, server: Server, replies: Iterable[tuple[int, Any]]) -> tuple[Any, Metrics]:
        """How the replies change the state; also called where no client has replied."""
        raise NotImplementedError

    def materialise(self, state: Any, net: Net) -> None:
        """weights := state."""
        raise NotImplementedError

    def check(self, state: Any, client_id: int, up: Any) -> None:
        """Raise Illegal if this client may not reply so. A bad reply drops the client for the round."""

    @property
    def moves_base(self) -> bool:
        """Whether weights that the view freezes end as others too."""
        return False

    def reply_bytes(self, net: Net) -> int:
        """The most bytes that a reply's tensors take, longer are not read; by default twice the float32 weights."""
        return 8 * net.size + 256 * len(net.names) + (1 << 16)

    def evaluates(self) -> bool:
        """Whether its clients can evaluate: whether it has a `receive` of its own."""
        return type(self).receive is not Method.receive

    def released(self, level: Level) -> Released | None:
        """In what state each field of `Up` leaves a run private at that level; None: the method offers none."""
        return of_update(level, self.Up) if level in self.private else None

    def receive(self, down: Any, client: Client) -> None:
        """Fill the client's net as `down` means it, without training: for evaluation at the clients."""
        raise NotImplementedError(f"{type(self).__name__} does not evaluate at the clients")

    def fits(self, net: Net) -> None:
        """Raise ModelError for a net that this method cannot train; asked at either side before anything runs."""

    def check_clients(self, clients: int) -> None:
        """Raise ConfigError where its fields name a client that is not among so many; asked before anything runs."""

    def check_cohort(self, clients: int) -> None:
        """Raise ConfigError where a round of so many clients is too small for it; asked before anything runs."""

    def linear(self, secure: Secure) -> Linear:
        """Its mean as plain sums, which masks can cover; ConfigError with the reason where replies are more to it."""
        raise ConfigError(f"privacy.secure: {type(self).__name__} makes more of its clients' replies than their mean")

    @property
    def keeps_all(self) -> bool:
        """Whether its server half reads replies until the round has ended, and not one after another."""
        return False

    @property
    def measures(self) -> bool:
        """Whether its server half needs `Server.loss`."""
        return False

    def work(self, round: int) -> Work:
        """What a visit of this round computes; by default the fields `steps` and `batch_size`, where there are any."""
        return Work(steps=getattr(self, "steps", Work().steps), batch=getattr(self, "batch_size", 1))

    def frames(self, at: Expected) -> Frames | None:
        """The bytes of each visit's two frames, from least to most; None if they are not known before a run."""
        return None

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        """The peak of a side's memory, where `forward` is a pass over one batch; None if it is not known."""
        return None


class Averaged(Method):
    """A method whose server moves along the mean of what its clients' replies add: `update` and `step` are its own."""

    weighting: Literal["examples", "uniform"] = "examples"
    aggregation: AnyAggregation = Mean()
    server_step: AnyServerStep = Plain()

    @model_validator(mode="after")
    def _votes(self) -> Averaged:
        if "vote" in self.aggregation.kinds and not self.one_bit:
            raise ValueError("aggregation: a vote is of codes of one bit, and what travels here is none")
        return self

    def update(self, state: Any, server: Server, up: Any) -> Update:
        """What a legal reply adds: the one place where it is decoded for the mean, tensor by tensor."""
        raise NotImplementedError

    def update_of(self, state: Any, server: Server, client_id: int, up: Any) -> Update:
        """The same where it depends on who has replied."""
        return self.update(state, server, up)

    def origin(self, state: Any) -> Mapping[str, Tensor]:
        """By name what an update's tensor was at the round's start, where it is a state; the others are changes."""
        return {}

    def step(
        self, state: Any, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Any, Metrics]:
        """What the mean, float32 by name, does to the state; `counted` has each client whose reply is in it."""
        raise NotImplementedError

    def aggregate(self, state: Any, server: Server, replies: Iterable[tuple[int, Any]]) -> tuple[Any, Metrics]:
        counted, private = list[Counted](), server.protection is not None

        def updates() -> Iterator[tuple[int, Update]]:
            for client, up, weight in self.weighed(server, replies):
                update = self.update_of(*server.asked(client, state), client, up)
                if server.weighing.agreement is not None:
                    update = update._replace(weight=weight)
                counted.append(Counted(client, update.weight, {} if private else update.metrics))
                yield client, update
                del up, update  # large ones are gone before the next one comes

        rise = self._rise(state, server, server.loss) if self.measures and server.loss else None
        setting = Setting(self.origin(state), rise, server.spool, server.left_out, server.key, server.lengths)
        noised = Noised(server.protection, len(server.cohort), server.secrets) if server.protection else None
        mean, metrics = (noised or self.aggregation)(updates(), setting)
        if server.left_out:
            metrics = metrics | {"left_out": len(server.left_out)}
            server.weighing.leave_out(server.left_out)
        if not mean:
            return state, metrics
        state, own = self.step(state, server, mean, [each for each in counted if each.client not in server.left_out])
        return state, metrics | own

    def weight(self, up: Any) -> float:
        """How much a reply counts in the mean, where the run has no agreement."""
        return up.examples if self.weighting == "examples" else 1

    def weighed(self, server: Server, replies: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any, float]]:
        """Each reply that counts, with how much it does."""
        return server.weighing(replies, self.weight)

    def check_cohort(self, clients: int) -> None:
        self.aggregation.check_cohort(clients)

    @property
    def additive(self) -> bool:
        """Whether an update, by the round in which it was asked for, is a change that a later state can take too."""
        return False

    @property
    def one_bit(self) -> bool:
        """Whether an update's numbers are signs and a scale."""
        return False

    @property
    def keeps_all(self) -> bool:
        return self.aggregation.keeps_all

    @property
    def measures(self) -> bool:
        return "gated" in self.aggregation.kinds

    def _rise(self, state: Any, server: Server, measured: Callable[[], float]) -> Callable[[int, Update], float]:
        """By how much the loss on the server's rows rises where a client's update is all that the state moves by."""
        before, trial = list[float](), replace(server, versions=Trial(server.versions))

        def loss(of: Any) -> float:
            self.materialise(of, server.net)
            return measured()

        def rise(client: int, update: Update) -> float:
            before.extend([] if before else [loss(state)])
            mean, _ = Mean()([(client, update)])
            return loss(self.step(state, trial, mean, [Counted(client, update.weight, update.metrics)])[0]) - before[0]

        return rise
