"""TGAP, the first stage of CG-FedLLM (Wu et al., 2024): plain local steps, whose replies a codec is learnt from.

Down: the factors of a LoRA view. Up: the client's own increment (or state, or gradient) of them, as it is: nothing
protects it. The server goes on from the mean. `thinwire fit-codec` learns the codec from what it has received.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, fixed
from thinwire.model.net import Net
from thinwire.train.factors import OnFactors
from thinwire.train.weights import fill
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST
from thinwire.wire.payload import LATE

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Factors:
    """The factors of stage 1; also the server's state, with the memory of its step."""

    weights: Tensors
    lr: float = 0.0
    moments: Tensors | None = field(default=None, metadata=LATE)


@dataclass(frozen=True)
class Gathered:
    """A client's own increment as it is: nothing protects it."""

    update: Tensors = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


class Tgap(OnFactors):
    """Stage 1: plain local steps on the spared rows; the replies, unprotected, are what a codec is learnt from.

    `federated`: the server goes on from the mean, as in the paper's later version; else each client from its own last
    factors, as in its first.
    """

    name: Literal["tgap"] = "tgap"
    spared: float = Field(0.3, gt=0, lt=1)
    federated: bool = True

    Down, Up, State = Factors, Gathered, Factors
    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2405.13746, stage 1"

    def init(self, server: Server) -> Factors:
        self.image(server.net)
        return Factors({name: server.net.base[name] for name in server.net.names})

    def broadcast(self, state: Factors, server: Server, client_id: int, held: str | None) -> Factors:
        return Factors(state.weights, self.rate(server))

    def client_update(self, down: Factors, client: Client) -> Gathered:
        weights = dict(down.weights)
        if not self.federated:
            weights = {name: client.memory.get(name, tensor) for name, tensor in weights.items()}
        learnt, loss, skipped = self.learn(weights, client, down.lr, first=True)
        if not self.federated:
            for name, tensor in weights.items():
                moved = learnt[name] if self.encode == "state" else tensor.float() + learnt[name]
                client.memory[name] = moved.to(tensor.dtype)
        return Gathered(learnt, len(client.data), loss, skipped)

    def check(self, state: Factors, client_id: int, up: Gathered) -> None:
        if set(up.update) != set(state.weights):
            raise Illegal("the names of the updates are not the model's")
        for name, tensor in up.update.items():
            if tensor.shape != state.weights[name].shape or tensor.dtype != torch.float32:
                raise Illegal(f"the update of {name} is {tensor.dtype} {list(tensor.shape)}")
            if not bool((tensor.abs() <= LARGEST).all()):
                raise Illegal(f"the update of {name} is beyond {LARGEST:g} or not finite")

    def update(self, state: Factors, server: Server, up: Gathered) -> Update:
        return Update(up.update, self.weight(up), up.loss, up.skipped)

    def origin(self, state: Factors) -> Mapping[str, Tensor]:
        return state.weights if self.encode == "state" else {}

    def step(
        self, state: Factors, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Factors, Metrics]:
        if not self.federated:
            return state, {}
        weights, moments = self.moved(state.weights, mean, state.moments)
        return Factors(weights, moments=moments), {}

    def materialise(self, state: Factors, net: Net) -> None:
        fill(net, state.weights)

    def frames(self, at: Expected) -> Frames | None:
        plain = {name: torch.empty(tensor.shape, device="meta") for name, tensor in at.trained.items()}
        return fixed(at, Factors(at.trained, 0.0), lambda examples: Gathered(plain, examples, 0.0, 0))
