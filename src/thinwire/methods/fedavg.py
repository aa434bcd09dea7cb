"""FedAvg (McMahan et al., 2017) on every parameter: whole weights travel both ways.

Down: the global weights. Up: the client's weights after its local steps. The server takes their mean, weighted by
examples. The reference that the thin methods are measured against. FedProx is the field `proximal`, FedAvgM, FedAdam
and FedYogi are the field `server_step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from thinwire.aggregate.linear import Changes
from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import stepped
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, fixed
from thinwire.model.net import Net
from thinwire.privacy.protection import BOTH
from thinwire.privacy.secure import Secure
from thinwire.train.first_order import FirstOrder
from thinwire.train.weights import Trained, check_weights, fill, fill_checked
from thinwire.wire.legal import check_rate
from thinwire.wire.payload import LATE


@dataclass(frozen=True)
class Weights:
    """Named weights, in the net's dtype; also the server's state, with the memory of its step."""

    weights: Mapping[str, Tensor]
    lr: float = 0.0
    moments: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)


class FedAvg(FirstOrder):
    """Local first-order steps on all parameters, then the weighted mean of the clients' weights."""

    name: Literal["fedavg"] = "fedavg"

    Down, Up, State = Weights, Trained, Weights
    paper: ClassVar[str] = "McMahan et al. 2017, arXiv:1602.05629"
    private = BOTH

    def init(self, server: Server) -> Weights:
        return Weights({name: server.net.base[name] for name in server.net.names})

    def broadcast(self, state: Weights, server: Server, client_id: int, held: str | None) -> Weights:
        return Weights(state.weights, self.rate(server))

    def client_update(self, down: Weights, client: Client) -> Trained:
        self.receive(down, client)
        local = self.train(client, down.lr)
        weights = {name: p.detach() for name, p in client.net.parameters()}
        return Trained(weights, len(client.data), local.loss, local.skipped)

    def check(self, state: Weights, client_id: int, up: Trained) -> None:
        check_weights(state.weights, up.weights)

    def update(self, state: Weights, server: Server, up: Trained) -> Update:
        return Update(up.weights, self.weight(up), up.loss, up.skipped)

    def origin(self, state: Weights) -> Mapping[str, Tensor]:
        return state.weights

    def linear(self, secure: Secure) -> Changes:
        return Changes(self, secure)

    def step(
        self, state: Weights, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Weights, Metrics]:
        weights, moments = stepped(self.server_step, state.weights, mean, state.moments)
        return Weights(weights, moments=moments), {}

    def materialise(self, state: Weights, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Weights, client: Client) -> None:
        check_rate(down.lr)
        fill_checked(client.net, down.weights)

    def frames(self, at: Expected) -> Frames | None:
        return fixed(at, Weights(at.trained, 0.0), lambda examples: Trained(at.trained, examples, 0.0, 0))
