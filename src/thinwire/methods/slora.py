"""SLoRA (Babakniya et al., 2023): a few of the layers' own weights first, then LoRA from the best factors of that.

    stage 1   FedAvg on the weights of a mask, drawn once and for all: all others keep their bits
    then      W1 - W = U S V^T of each layer        s B A = U_r S_r V_r^T        W as at the start
    stage 2   FedIT from these factors

Down and up in stage 1: the masked weights; the mask is a key. In stage 2: A and B. By default a mask has as many
weights as its layer's factors have numbers, so that both stages weigh the same. The last round of stage 1 is one that
has replies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire import streams
from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.products import Pair, best_of
from thinwire.aggregate.server_step import stepped
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, Span, fixed
from thinwire.costs.memory import Memory, Side, averaging, training
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder, proximal
from thinwire.train.local import Adjust, Local, Rule, train_locally
from thinwire.train.merged import check_merges, fill_merged, layers_of
from thinwire.train.products import check_trained, named, places
from thinwire.train.weights import Trained, alone, check_weights, fill, fill_checked
from thinwire.wire.legal import check_keys, check_rate
from thinwire.wire.payload import LATE


@dataclass(frozen=True)
class Stage:
    """In stage 1 the masked weights, a vector a layer, and the mask's key; in stage 2 the factors, and no values."""

    factors: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    key: int
    lr: float = 0.0
    moments: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)


class SLora(FirstOrder):
    """Sparse training of the layers' own weights, then of factors that begin as the best of what it has changed."""

    name: Literal["slora"] = "slora"
    first: float = Field(0.5, gt=0, lt=1)  # share of the rounds that are of stage 1, rounded down
    density: float | None = Field(None, gt=0, le=1)  # of a mask; None: as many weights as the layer's factors have

    Down, Up, State = Stage, Trained, Stage
    paper: ClassVar[str] = "Babakniya et al. 2023, arXiv:2308.06522"
    keeps: ClassVar[bool] = False

    def init(self, server: Server) -> Stage:
        net, key = server.net, server.key.fold("mask").word()
        factors = {name: net.base[name] for name in net.names}
        if not self._sparse_rounds(server.rounds):
            return Stage(factors, {}, key)
        places = self._masks(net, key)
        return Stage(factors, {name: net.base[name].flatten()[mask] for name, mask in places.items()}, key)

    def broadcast(self, state: Stage, server: Server, client_id: int, held: str | None) -> Stage:
        return Stage({} if state.values else state.factors, state.values, state.key, self.rate(server))

    def client_update(self, down: Stage, client: Client) -> Trained:
        self.receive(down, client)
        if not down.values:
            local = self.train(client, down.lr)
            factors = {name: p.detach() for name, p in client.net.parameters()}
            return Trained(factors, len(client.data), local.loss, local.skipped)
        masks = self._masks(client.net, down.key)
        local = self._train_masked(client, down.lr, masks)
        model = client.net.model
        values = {name: model.get_parameter(name).detach().flatten()[mask] for name, mask in masks.items()}
        return Trained(values, len(client.data), local.loss, local.skipped)

    def check(self, state: Stage, client_id: int, up: Trained) -> None:
        check_weights(state.values or state.factors, up.weights)

    def update(self, state: Stage, server: Server, up: Trained) -> Update:
        return Update(up.weights, self.weight(up), up.loss, up.skipped)

    def origin(self, state: Stage) -> Mapping[str, Tensor]:
        return state.values or state.factors

    def step(
        self, state: Stage, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Stage, Metrics]:
        after, moments = stepped(self.server_step, state.values or state.factors, mean, state.moments)
        if not state.values:
            return dataclasses.replace(state, factors=after, moments=moments), {}
        if server.round < self._sparse_rounds(server.rounds):
            return dataclasses.replace(state, values=after, moments=moments), {}
        return Stage(self._switched(server.net, state.key, after, state.factors), {}, state.key), {}

    def materialise(self, state: Stage, net: Net) -> None:
        fill_merged(net, self._weights(net, state))
        fill(net, state.factors)

    def receive(self, down: Stage, client: Client) -> None:
        check_rate(down.lr)
        check_keys(down.key)
        net = client.net
        if down.values:
            known = {name: net.base[name].flatten()[mask] for name, mask in self._masks(net, down.key).items()}
            check_weights(known, down.values)
        fill_merged(net, self._weights(net, down))
        if down.values:
            fill(net, net.base)
        else:
            fill_checked(net, down.factors)

    def reply_bytes(self, net: Net) -> int:
        masked = 0
        for place in net.adapted().values():
            factors = net.base[place.left].numel() + net.base[place.right].numel()
            masked += self._count(net.base[place.weight].numel(), factors)
        return 8 * max(net.size, masked) + 256 * len(net.names) + (1 << 16)

    def fits(self, net: Net) -> None:
        check_trained(net.names, self.name)
        check_merges(net)

    def frames(self, at: Expected) -> Frames | None:
        sparse, values = self._sparse_rounds(len(at.cohorts)), dict[str, Tensor]()
        for name, weight in _layers(at.trained).items():
            left, right = weight.shape[1], weight.shape[0]
            rank = at.trained[places(at.trained)[name].left].shape[0]
            values[f"{name}.base_layer.weight"] = weight.new_empty(self._count(weight.numel(), rank * (left + right)))
        one = fixed(at, Stage({}, values, 1 << 63), lambda examples: Trained(values, examples, 0.0, 0))
        two = fixed(at, Stage(at.trained, {}, 1 << 63), lambda examples: Trained(at.trained, examples, 0.0, 0))

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            return (one if round <= sparse else two)(round, client, new)

        return frames

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        if side == "server":
            return averaging(at, self.server_step.kind)
        # gradients and moments are those of whole layers, of which the mask leaves a few
        whole = dataclasses.replace(at, trained=_layers(at.trained))
        both = [training(each, forward, self.optimiser, self.recompute) for each in (at, whole)]
        return max(both, key=lambda memory: memory.total)

    def _sparse_rounds(self, rounds: int) -> int:
        return math.floor(self.first * rounds)

    def _count(self, weights: int, factors: int) -> int:
        """How many of a layer's weights its mask has; `factors`: how many numbers its factors."""
        return min(weights, factors) if self.density is None else max(1, round(self.density * weights))

    def _masks(self, net: Net, key: int) -> dict[str, Tensor]:
        """By each layer's weight the places in it, flat, that stage 1 trains: ascending, int64."""
        found: dict[str, Tensor] = {}
        for i, place in enumerate(net.adapted().values()):
            weights = net.model.get_parameter(place.weight).numel()
            factors = net.base[place.left].numel() + net.base[place.right].numel()
            count, words = self._count(weights, factors), streams.words(key, [i], weights)[0]
            chosen = words.argpartition(count - 1)[:count] if count < weights else words.argsort()
            found[place.weight] = torch.from_numpy(chosen).sort().values
        return found

    def _weights(self, net: Net, state: Stage) -> dict[str, Tensor]:
        """The layers' own weights: those of the start but for the values."""
        weights = {layer.weight: net.base[layer.weight] for layer in layers_of(net).values()}
        if state.values:
            for name, mask in self._masks(net, state.key).items():
                changed = weights[name].flatten().clone()
                changed[mask] = state.values[name].to(changed)
                weights[name] = changed.view(weights[name].shape)
        return weights

    def _train_masked(self, client: Client, lr: float, masks: Mapping[str, Tensor]) -> Local:
        """Local steps on the masked weights alone: without weight decay, which would move the others."""
        parameters = [client.net.model.get_parameter(name) for name in masks]
        pull = proximal(self.proximal) if self.proximal else None

        def adjust(weights: Sequence[Tensor]) -> None:
            if pull is not None:
                pull(weights)
            for weight, mask in zip(weights, masks.values(), strict=True):
                if weight.grad is not None:
                    flat = weight.grad.flatten()
                    chosen = mask.to(flat.device)
                    weight.grad = torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen]).view(weight.shape)

        hand: Adjust = adjust
        with alone(client.net, parameters):
            return train_locally(
                client.net.model,
                parameters,
                client.data.batches(client.key.fold("batches"), self.batch_size),
                Rule(self.optimiser, lr, self.steps, 0.0, self.clip, self.warmup),
                adjust=hand,
                recompute=self.recompute,
            )

    def _switched(
        self, net: Net, key: int, values: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The factors whose product is the best of what stage 1 has changed."""
        masks, found = self._masks(net, key), dict[str, Pair]()
        for name, layer in layers_of(net).items():
            start, mask = net.base[layer.weight].cpu(), masks[layer.weight]
            change = torch.zeros(start.numel(), dtype=torch.float64)
            change[mask] = values[layer.weight].cpu().double() - start.flatten()[mask].double()
            change = change.view(start.shape)
            pair = best_of(change.T if layer.turned else change, like[places(like)[name].left].shape[0])
            found[name] = Pair(pair.left, pair.right / layer.scale)
        return named(found, like)


def _layers(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers' own weights [out, in], as tensors without memory, by layer."""
    return {
        name: trained[place.left].new_empty(trained[place.right].shape[0], trained[place.left].shape[1])
        for name, place in places(trained).items()
    }
