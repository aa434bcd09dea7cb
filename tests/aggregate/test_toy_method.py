"""A method of one's own on the seams: its half of the clients, what a reply adds, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from federation import Federation, tiny_net
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import stepped
from thinwire.core import Client, Server
from thinwire.evaluate.loss import mean_loss
from thinwire.methods.fedavg import Weights
from thinwire.train.first_order import FirstOrder
from thinwire.train.weights import fill


@dataclass(frozen=True)
class Signs:
    """The signs of what a client has changed, int8."""

    signs: Mapping[str, Tensor] = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})


class SignedAvg(FirstOrder):
    """The server moves each weight by a hundredth towards where most clients went."""

    name: Literal["signed"] = "signed"
    Down, Up, State = Weights, Signs, Weights

    def init(self, server: Server) -> Weights:
        return Weights({name: server.net.base[name] for name in server.net.names})

    def broadcast(self, state: Weights, server: Server, client_id: int, held: str | None) -> Weights:
        return Weights(state.weights, self.lr)

    def client_update(self, down: Weights, client: Client) -> Signs:
        fill(client.net, down.weights)
        self.train(client, down.lr)
        return Signs({n: (p - down.weights[n]).sign().char() for n, p in client.net.parameters()}, len(client.data))

    def update(self, state: Weights, server: Server, up: Signs) -> Update:
        return Update({n: state.weights[n] + 1e-2 * s.float() for n, s in up.signs.items()}, self.weight(up))

    def step(self, state: Weights, server: Server, mean: Any, counted: Sequence[Counted]) -> tuple[Weights, Metrics]:
        weights, moments = stepped(self.server_step, state.weights, mean, state.moments)
        return Weights(weights, moments=moments), {"clients": len(counted)}

    def materialise(self, state: Weights, net: Any) -> None:
        fill(net, state.weights)


def test_it_learns_under_every_step_of_the_server(tmp_path: Path) -> None:
    net = tiny_net(tmp_path / "model")
    for step in ("plain", "momentum", "adam"):  # a name alone has its own defaults
        method = SignedAvg(lr=1e-2, steps=4, server_step=step)
        federation = Federation(method, net, tmp_path / step, rounds=4)
        method.materialise(federation.state, net)
        before, _ = mean_loss(net.model, federation.data[0], 16)
        federation.run()
        method.materialise(federation.state, net)
        assert mean_loss(net.model, federation.data[0], 16)[0] < before - 0.005, step
        assert federation.metrics["clients"] == 3
        assert torch.isfinite(next(iter(federation.state.weights.values()))).all()
