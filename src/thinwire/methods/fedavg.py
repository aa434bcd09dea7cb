"""FedAvg (McMahan et al., 2017) on every parameter: whole weights travel both ways.

Down: the global weights. Up: the client's weights after its local steps. The server takes their mean, weighted by
examples. The reference that the thin methods are measured against.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from thinwire.core import Client, Method, Metrics, Server
from thinwire.model.net import Net
from thinwire.train.local import Optimiser, train_locally
from thinwire.train.schedule import Schedule, scheduled
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST, check_rate


@dataclass(frozen=True)
class Weights:
    """Named weights, in the net's dtype; also the server's state."""

    weights: Mapping[str, Tensor]
    lr: float = 0.0


@dataclass(frozen=True)
class Trained:
    """A client's weights, the examples that it holds, its mean loss over the local steps, and the steps skipped."""

    weights: Mapping[str, Tensor] = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


class FirstOrder(Method):
    """What methods of local first-order steps on all parameters have in common."""

    name: str
    lr: float = Field(2e-5, gt=0, le=100)
    schedule: Schedule = "constant"
    optimiser: Optimiser = "adamw"
    weight_decay: NonNegativeFloat = 0.0
    steps: PositiveInt = 10
    batch_size: PositiveInt = 8
    clip: NonNegativeFloat = 1.0  # of the gradient's norm; 0: none
    weighting: Literal["examples", "uniform"] = "examples"
    recompute: bool = False  # what is within a layer is computed again on the way back: less memory, more time

    def train(
        self,
        client: Client,
        lr: float,
        masters: list[Tensor] | None = None,
        model: nn.Module | None = None,
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> tuple[float, int]:
        """The local steps on the client's net, or on these parameters of a model, in place; see train_locally."""
        batches = client.data.batches(client.key.fold("batches"), self.batch_size)
        return train_locally(
            model if model is not None else client.net.model,
            parameters if parameters is not None else [p for _, p in client.net.parameters()],
            batches,
            self.steps,
            self.optimiser,
            lr,
            self.weight_decay,
            self.clip,
            masters,
            self.recompute,
        )

    def passes(self) -> float:
        return 3 * self.steps * self.batch_size


class FedAvg(FirstOrder):
    """Local first-order steps on all parameters, then the weighted mean of the clients' weights."""

    name: Literal["fedavg"] = "fedavg"

    Down, Up, State = Weights, Trained, Weights
    paper: ClassVar[str] = "McMahan et al. 2017, arXiv:1602.05629"

    def init(self, server: Server) -> Weights:
        return Weights({name: server.net.base[name] for name in server.net.names})

    def broadcast(self, state: Weights, server: Server, client_id: int, held: str | None) -> Weights:
        return Weights(state.weights, scheduled(self.schedule, self.lr, server.round, server.rounds))

    def client_update(self, down: Weights, client: Client) -> Trained:
        self.receive(down, client)
        loss, skipped = self.train(client, down.lr)
        weights = {name: p.detach() for name, p in client.net.parameters()}
        return Trained(weights, len(client.data), loss, skipped)

    def check(self, state: Weights, client_id: int, up: Trained) -> None:
        check_weights(state.weights, up.weights)

    def aggregate(
        self, state: Weights, server: Server, replies: Iterable[tuple[int, Trained]]
    ) -> tuple[Weights, Metrics]:
        weights, metrics = average(state.weights, replies, self.weighting)
        return Weights(weights), metrics

    def materialise(self, state: Weights, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Weights, client: Client) -> None:
        check_rate(down.lr)
        fill_checked(client.net, down.weights)


def check_weights(known: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Illegal unless weights have the names, shapes and dtypes of the known ones, and are within LARGEST of them."""
    if set(weights) != set(known):
        raise Illegal("the names of the weights are not the model's")
    for name, tensor in weights.items():
        mine = known[name]
        if tensor.shape != mine.shape or tensor.dtype != mine.dtype:
            raise Illegal(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {mine.dtype} {list(mine.shape)}")
        change = tensor.to(torch.float32, copy=True).sub_(mine.to(tensor.device))
        if not (change.abs_() <= LARGEST).all():
            raise Illegal(
                f"{name} is not finite" if not torch.isfinite(tensor).all() else f"{name} is beyond {LARGEST:g}"
            )


def average(
    known: Mapping[str, Tensor], replies: Iterable[tuple[int, Trained]], weighting: str
) -> tuple[Mapping[str, Tensor], Metrics]:
    """The mean of the replies' weights in the known ones' dtypes, and its metrics; the known ones without a reply."""
    mean, metrics = running_mean(replies, weighting)
    return {name: mean.pop(name).to(known[name].dtype) for name in list(mean)} or known, metrics


def running_mean(replies: Iterable[tuple[int, Trained]], weighting: str) -> tuple[dict[str, Tensor], Metrics]:
    """The weighted mean of what the replies hold, float32, and its metrics; nothing at all without a reply.

    m += (w - m) n_i / n: one client's tensor in memory at a time. A tensor's mean is over those that hold it.
    """
    mean: dict[str, Tensor] = {}
    totals: dict[str, int] = {}
    loss, measured, skipped = 0.0, 0, 0
    for _, up in replies:
        weight = up.examples if weighting == "examples" else 1
        for name, tensor in up.weights.items():
            totals[name] = totals.get(name, 0) + weight
            if name in mean:
                mean[name].lerp_(tensor.float(), weight / totals[name])
            else:
                mean[name] = tensor.to(torch.float32, copy=True)
        if math.isfinite(up.loss):
            measured += weight
            loss += (up.loss - loss) * weight / measured
        skipped += up.skipped
    return mean, {"loss": loss, "skipped": skipped} if mean else {}


def fill_checked(net: Net, weights: Mapping[str, Tensor]) -> None:
    """`fill` with weights from elsewhere; Illegal, and nothing is copied, where they are not such a net's."""
    check_weights({name: net.base[name] for name in net.names}, weights)
    fill(net, weights)


@torch.no_grad()
def fill(net: Net, weights: Mapping[str, Tensor]) -> None:
    """Copy named weights into the net's parameters."""
    for name, parameter in net.parameters():
        parameter.copy_(weights[name])
