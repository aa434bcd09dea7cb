"""RoLoRA (Chen et al., 2024): one factor of each pair trains in a round, and the other one in the next.

    a round of B:   B_i = B after T local steps, A as it is       B <- sum_i (n_i / n) B_i
    a round of A:   the same with A and B exchanged

With one factor the same for all, the mean of the factors is the factor of the mean product: nothing is lost, as in
FFA-LoRA, and both are learnt. Down: to who was there in the last round the factor that it changed, to others both.
Up: the factor that trains. A classifier's head trains in every round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import stepped
from thinwire.core import Client, Server, StaleVersion
from thinwire.costs.frames import VERSION, Expected, Frames, Span
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder
from thinwire.train.weights import Trained, alone, check_weights, fill, fill_checked
from thinwire.wire import Illegal
from thinwire.wire.legal import check_rate
from thinwire.wire.payload import LATE

OTHER = {"A": "B", "B": "A"}  # factor -> the one whose turn comes next


@dataclass(frozen=True)
class Turns:
    """The factors, their version and the one before, what changed in between, and which factor trains next."""

    weights: Mapping[str, Tensor]
    version: str
    turn: str = "B"
    prior: str | None = None
    moments: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)


@dataclass(frozen=True)
class Turn:
    """The factors, or to who holds the version `base` those that are others in `version`; which of them trains."""

    weights: Mapping[str, Tensor]
    base: str | None
    version: str
    turn: str
    lr: float


class RoLora(FirstOrder):
    """Local first-order steps on one factor of a LoRA view, in turns; its mean is exact."""

    name: Literal["rolora"] = "rolora"

    Down, Up, State = Turn, Trained, Turns
    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2409.02346"
    keeps: ClassVar[bool] = False

    def init(self, server: Server) -> Turns:
        weights = {name: server.net.base[name] for name in server.net.names}
        return Turns(weights, server.versions.put(weights))

    def broadcast(self, state: Turns, server: Server, client_id: int, held: str | None) -> Turn:
        weights, base = state.weights, None
        if held == state.version:
            weights, base = {}, held
        elif held is not None and held == state.prior:
            weights, base = _of(OTHER[state.turn], state.weights), held
        return Turn(weights, base, state.version, state.turn, self.rate(server))

    def client_update(self, down: Turn, client: Client) -> Trained:
        self.receive(down, client)
        chosen = _of(down.turn, dict(client.net.parameters()))
        with alone(client.net, chosen.values()):
            local = self.train(client, down.lr, client.net.model, list(chosen.values()), list(chosen))
        return Trained({name: p.detach() for name, p in chosen.items()}, len(client.data), local.loss, local.skipped)

    def check(self, state: Turns, client_id: int, up: Trained) -> None:
        check_weights(_of(state.turn, state.weights), up.weights)

    def update(self, state: Turns, server: Server, up: Trained) -> Update:
        return Update(up.weights, self.weight(up), up.loss, up.skipped)

    def origin(self, state: Turns) -> Mapping[str, Tensor]:
        return state.weights

    def step(
        self, state: Turns, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Turns, Metrics]:
        after, moments = stepped(self.server_step, state.weights, mean, state.moments)
        weights = {name: after.get(name, tensor) for name, tensor in state.weights.items()}
        if moments is not None:
            moments = {**(state.moments or {}), **moments}  # those of the other factor wait for its turn
        version = server.versions.put(weights)
        return Turns(weights, version, OTHER[state.turn], state.version, moments), {}

    def materialise(self, state: Turns, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Turn, client: Client) -> None:
        check_rate(down.lr)
        if down.turn not in OTHER:
            raise Illegal(f"the factor {down.turn!r:.20}")
        weights = dict(down.weights)
        if down.base is not None:
            held = client.versions.get(down.base)
            if held is None or set(held) != set(client.net.names):
                raise StaleVersion
            weights = dict(held) | weights
        fill_checked(client.net, weights)
        if client.versions.put(weights) != down.version:
            raise Illegal(f"the factors are not the version {down.version:.12}")
        client.held = down.version

    def fits(self, net: Net) -> None:
        if any(not any(f".lora_{factor}." in name for name in net.names) for factor in OTHER):
            raise ModelError(f"model.lora: missing; {self.name} trains both factors of a LoRA view in turns")

    def frames(self, at: Expected) -> Frames | None:
        halves = [_of(turn, at.trained) for turn in "AB"]  # of an even round, of an odd one

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            there = not new and client in at.cohorts[round - 2]
            weights, base = (halves[(round - 1) % 2], VERSION) if there else (at.trained, None)
            down = at.length(Turn(weights, base, VERSION, "B", 0.0), round, client)
            held = at.examples[client]
            ends = [
                at.length(Trained(halves[round % 2], count, 0.0, 0), round, client, VERSION)
                for count in ((1, 65535) if held is None else (held,))
            ]
            return Span(down, down), Span(min(ends), max(ends))

        return frames


def _of(turn: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What trains in a factor's turn."""
    return {name: weight for name, weight in weights.items() if f".lora_{OTHER[turn]}." not in name}
