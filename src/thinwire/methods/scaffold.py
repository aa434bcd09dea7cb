"""SCAFFOLD (Karimireddy et al., 2020): control variates take out of a client's steps what its rows alone pull towards.

Client i keeps c_i, the server c; both begin at 0. N clients are in the run, K steps are taken, of the rates r_1 .. r_K:

    step      y <- y - r_k (g_i(y) + c - c_i)
    client    c_i' = c_i - c + (w - y) / (r_1 + ... + r_K)        option II: the mean of the visit's own gradients
    server    w <- w + s(mean_i y_i - w)        c <- c + |S| / N mean_i (c_i' - c_i)

Down: w and c. Up: y_i and what c_i has moved by. Each way twice FedAvg's bytes. Steps are plain SGD, for which alone
option II is a mean of gradients; a decay of weights is in it as if it were the loss's. Where a step is clipped (in the
paper none is: `clip = 0`), c_i is of clipped gradients. The means are uniform, as the paper's; `weighting = "examples"`
is for objectives weighted so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import stepped
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, fixed
from thinwire.costs.memory import Memory, Side, averaging, training
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder
from thinwire.train.weights import check_weights, fill, fill_checked
from thinwire.wire import Illegal, LazyTensors
from thinwire.wire.legal import LARGEST, check_rate
from thinwire.wire.payload import Spec, specs_of

Tensors = Mapping[str, Tensor]
CONTROL = "control/"  # a tensor's c_i in a client's memory, and the change of it among what is averaged


@dataclass(frozen=True)
class Controlled:
    """The weights in the net's dtype, and c: float32 as the server's state, which has the memory of its step too."""

    weights: Tensors
    controls: Tensors
    moments: Tensors | None = None


@dataclass(frozen=True)
class Model:
    """The weights and c, both in the net's dtype."""

    weights: Tensors
    controls: Tensors
    lr: float


@dataclass(frozen=True)
class Corrected:
    """A client's weights, and what its c_i has moved by, in the net's dtype; the rest as in FedAvg."""

    weights: Tensors = field(metadata={"release": True})
    controls: Tensors = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


class Scaffold(FirstOrder):
    """Local SGD steps corrected by control variates; weights and control variates travel both ways."""

    name: Literal["scaffold"] = "scaffold"
    lr: float = Field(1e-2, gt=0, le=100)
    optimiser: Literal["sgd"] = "sgd"
    moments: Literal["fresh"] = "fresh"  # SGD has none
    weighting: Literal["examples", "uniform"] = "uniform"

    Down, Up, State = Model, Corrected, Controlled
    paper: ClassVar[str] = "Karimireddy et al. 2020, arXiv:1910.06378"
    keeps: ClassVar[bool] = False

    def init(self, server: Server) -> Controlled:
        weights = {name: server.net.base[name] for name in server.net.names}
        return Controlled(weights, {name: torch.zeros(tensor.shape) for name, tensor in weights.items()})

    def broadcast(self, state: Controlled, server: Server, client_id: int, held: str | None) -> Model:
        controls = {n: c.to(state.weights[n].dtype) for n, c in state.controls.items()}
        return Model(state.weights, controls, self.rate(server))

    def client_update(self, down: Model, client: Client) -> Corrected:
        self.receive(down, client)
        net, kept = client.net, dict[str, Tensor]()
        for name, parameter in net.parameters():
            own = client.memory.get(CONTROL + name)
            kept[name] = torch.zeros(parameter.shape) if own is None or own.shape != parameter.shape else own
        shifts = [(down.controls[n].float() - kept[n]).to(p.device) for n, p in net.parameters()]

        @torch.no_grad()
        def correct(weights: Sequence[Tensor]) -> None:
            for weight, shift in zip(weights, shifts, strict=True):
                if weight.grad is not None:
                    weight.grad.add_(shift)

        local = self.train(client, down.lr, keep=True, adjust=correct)
        taken = self.steps - local.skipped
        rates = down.lr * sum(min(1.0, (step + 1) / (self.warmup + 1)) for step in range(taken))
        weights, moved = dict[str, Tensor](), dict[str, Tensor]()
        for (name, parameter), shift, master in zip(net.parameters(), shifts, local.weights, strict=True):
            weights[name] = parameter.detach()
            # c_i' - c_i = -c + (w - y) / rates; -c = -(shift + c_i)
            change = torch.zeros(parameter.shape)
            if rates:
                mean = (down.weights[name].to(master) - master.detach()).cpu() / rates
                change = mean - shift.cpu() - kept[name]
            moved[name] = change.to(parameter.dtype)
            if not torch.isfinite(moved[name]).all():
                raise Illegal(f"the control variate of {name} is not finite")
            client.memory[CONTROL + name] = kept[name] + moved[name].float()  # by what the server receives, to the bit
        return Corrected(weights, moved, len(client.data), local.loss, local.skipped)

    def check(self, state: Controlled, client_id: int, up: Corrected) -> None:
        check_weights(state.weights, up.weights)
        self._check_controls(specs_of(state.weights), up.controls)

    def update(self, state: Controlled, server: Server, up: Corrected) -> Update:
        specs = {**specs_of(up.weights), **{CONTROL + name: spec for name, spec in specs_of(up.controls).items()}}

        def read(name: str) -> Tensor:
            return up.controls[name.removeprefix(CONTROL)] if name.startswith(CONTROL) else up.weights[name]

        return Update(LazyTensors(specs, read), self.weight(up), up.loss, up.skipped)

    def origin(self, state: Controlled) -> Mapping[str, Tensor]:
        return state.weights

    def step(
        self, state: Controlled, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Controlled, Metrics]:
        share = min(1.0, len(counted) / server.clients) if server.clients else 1.0
        controls = {name: c + share * mean.pop(CONTROL + name) for name, c in state.controls.items()}
        weights, moments = stepped(self.server_step, state.weights, mean, state.moments)
        return Controlled(weights, controls, moments), {}

    def materialise(self, state: Controlled, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Model, client: Client) -> None:
        check_rate(down.lr)
        self._check_controls({n: Spec(p.dtype, tuple(p.shape)) for n, p in client.net.parameters()}, down.controls)
        fill_checked(client.net, down.weights)

    def _check_controls(self, known: Mapping[str, Spec], controls: Tensors) -> None:
        if set(controls) != set(known):
            raise Illegal("the names of the control variates are not the model's")
        for name, tensor in controls.items():
            if Spec.of(tensor) != known[name]:
                raise Illegal(f"the control variate of {name} is {tensor.dtype} {list(tensor.shape)}")
            if not (tensor.abs() <= LARGEST).all():
                raise Illegal(f"the control variate of {name} is beyond {LARGEST:g} or not finite")

    def frames(self, at: Expected) -> Frames | None:
        each = at.trained
        return fixed(at, Model(each, each, 0.0), lambda examples: Corrected(each, each, examples, 0.0, 0))

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        if side == "client":  # what it keeps and what it adds to gradients, in float32, and what came
            return training(at, forward, "sgd", self.recompute, copies=8 * at.size + 2 * at.trained_bytes)
        return averaging(at, self.server_step.kind, copies=8 * at.size)
