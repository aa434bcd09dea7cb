"""FedPepTAO (Che et al., 2023): some layers' prompts are shared, the others stay; control variates under AdamW.

The clients of the first round rank the layers, each on one of its batches, before they train:

    score_l = sum_i log e_i + 1 / e_i       e: eigenvalues of the cosine similarities of rows behind layer l, + 1e-5
    ratio   = the share of the spectrum of the loss's Hessian above the threshold where it stands still (Lanczos)

and the mean ratio of the layers is shared from then on, those of the highest mean score; each client keeps its own of
the others. A step of rate r, K of them in a visit, whose rates are R in all:

    client    y <- y - r (AdamW(g(y)) + c - c_i)        c_i <- c_i - c + (w - y) / R, the mean of its own AdamW steps
    server    c <- c + |S| / N mean_i ((w - y_i) / R_i - c)        w <- w + s(mean_i y_i - w), s: momentum

With SGD it is SCAFFOLD, with the second message saved: what c_i moves by follows from y_i. Whatever lies in layers is
ranked: prompts of a deep prompt view as in the paper, or factors, norms, biases; what lies beside them is shared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import AnyServerStep, Momentum, stepped
from thinwire.core import Client, Server, StaleVersion
from thinwire.costs.frames import Expected, Frames, Span
from thinwire.costs.memory import Memory, Side, averaging, training
from thinwire.costs.sketch import Pass, Sketch, Work
from thinwire.model.blocks import layers_of
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder
from thinwire.train.local import Adjust
from thinwire.train.spectrum import density, layer_scores, share_above
from thinwire.train.weights import check_weights, fill
from thinwire.wire import Illegal, LazyTensors
from thinwire.wire.legal import LARGEST, check_rate
from thinwire.wire.payload import Spec, specs_of

Tensors = Mapping[str, Tensor]
CONTROL, OWN = "control/", "own/"  # in a client's memory: c_i, and what is not shared; CONTROL also in the mean
HELD = "own"  # what a client reports that has its own of what is not shared


@dataclass(frozen=True)
class Shared:
    """The weights, of what is not shared as it last was; c, float32; which layers are shared, empty: not known yet."""

    weights: Tensors
    controls: Tensors
    layers: list[int]
    moments: Tensors | None = None


@dataclass(frozen=True)
class Part:
    """The weights and c of what is shared; all weights, to who has none of its own."""

    weights: Tensors
    controls: Tensors
    layers: list[int]
    lr: float


@dataclass(frozen=True)
class Ranked:
    """A client's weights of what is shared; in the first round its scores of the layers, and the ratio."""

    weights: Tensors = field(metadata={"release": True})
    scores: list[float] = field(metadata={"release": True})
    ratio: float = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


class FedPepTAO(FirstOrder):
    """Local steps on the shared and on a client's own layers, corrected by control variates.

    `share` of the layers that is shared; None: the ratio, for which each client of the first round computes `lanczos`
    products with its Hessian, two gradients each. `layers`: the dotted path of the model's, where it is not the longest
    list.
    """

    name: Literal["fedpeptao"] = "fedpeptao"
    lr: float = Field(1e-2, gt=0, le=100)
    moments: Literal["fresh"] = "fresh"
    server_step: AnyServerStep = Momentum(lr=0.1)  # of 0.9: the mean of what came, the newest a tenth
    share: float | None = Field(None, gt=0, le=1)
    lanczos: PositiveInt = 50
    layers: str | None = None

    Down, Up, State = Part, Ranked, Shared
    paper: ClassVar[str] = "Che et al. 2023, arXiv:2310.15080"
    keeps: ClassVar[bool] = False

    def init(self, server: Server) -> Shared:
        weights = {name: server.net.base[name] for name in server.net.names}
        return Shared(weights, {name: torch.zeros(tensor.shape) for name, tensor in weights.items()}, [])

    def broadcast(self, state: Shared, server: Server, client_id: int, held: str | None) -> Part:
        lr = self.rate(server)
        shared = _shared(state.weights, state.layers)
        weights = {name: state.weights[name] for name in (shared if state.layers and held == HELD else state.weights)}
        return Part(weights, {n: state.controls[n].to(state.weights[n].dtype) for n in shared}, state.layers, lr)

    def client_update(self, down: Part, client: Client) -> Ranked:
        self.receive(down, client)
        net, memory = client.net, client.memory
        scores, ratio = ([], 0.0) if down.layers else self._rank(client)
        start = {name: p.detach().cpu().clone() for name, p in net.parameters() if name in down.controls}
        kept = {name: _control(memory, name, tensor) for name, tensor in start.items()}
        shifts = {name: down.controls[name].float() - control for name, control in kept.items()}
        rates: list[float] = []
        local = self.train(client, down.lr, adjust=self._corrected(net, shifts, down.lr, rates))
        weights = {name: p.detach() for name, p in net.parameters()}
        for name, weight in weights.items():
            if name not in start or not down.layers:
                memory[OWN + name] = weight.cpu().clone()
            if name in start and rates:  # from what the server receives, as it finds it too
                moved = (start[name].float() - weight.cpu().float()) / sum(rates)
                memory[CONTROL + name] = kept[name] + moved - down.controls[name].float()
        client.held = HELD
        weights = {name: weights[name] for name in start}
        return Ranked(weights, scores, ratio, len(client.data), local.loss, local.skipped)

    def check(self, state: Shared, client_id: int, up: Ranked) -> None:
        check_weights({name: state.weights[name] for name in _shared(state.weights, state.layers)}, up.weights)
        if len(up.scores) != (0 if state.layers else len(_layers(state.weights))):
            raise Illegal(f"{len(up.scores)} scores of layers")
        if not all(map(math.isfinite, up.scores)) or not (state.layers or 0 <= up.ratio <= 1):
            raise Illegal(f"a score that is not finite, or a ratio of {up.ratio:g}")

    def update(self, state: Shared, server: Server, up: Ranked) -> Update:
        lr = self.rate(server)
        rates = sum(_rate(lr, self.warmup, step) for step in range(self.steps - up.skipped))
        specs = specs_of(up.weights)
        specs = {**specs, **{CONTROL + name: Spec(torch.float32, spec.shape) for name, spec in specs.items()}}

        def read(name: str) -> Tensor:
            own = name.removeprefix(CONTROL)
            if own == name:
                return up.weights[name]
            moved = (state.weights[own].float() - up.weights[own].float()) / rates if rates else state.controls[own]
            return moved - state.controls[own]

        metrics = {f"score {layer}": score for layer, score in enumerate(up.scores)} | {"ratio": up.ratio}
        return Update(LazyTensors(specs, read), self.weight(up), up.loss, up.skipped, metrics)

    def step(
        self, state: Shared, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Shared, Metrics]:
        share = min(1.0, len(counted) / server.clients) if server.clients else 1.0
        changes = {name: mean.pop(CONTROL + name) for name in state.controls if CONTROL + name in mean}
        controls = dict(state.controls)
        for name, change in changes.items():  # within what a client takes, whatever one of them has answered
            controls[name] = (controls[name] + share * change).clamp(-LARGEST, LARGEST)
        after, moments = stepped(self.server_step, state.weights, mean, state.moments)
        layers = state.layers or self._chosen(state.weights, counted)
        own = {"layers_shared": float(len(layers))}
        return Shared({n: after.get(n, w) for n, w in state.weights.items()}, controls, layers, moments), own

    def materialise(self, state: Shared, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Part, client: Client) -> None:
        check_rate(down.lr)
        net = client.net
        known = {name: net.base[name] for name in net.names}
        shared = _shared(known, down.layers)
        if not set(down.layers) <= set(_layers(known)) or set(down.controls) != set(shared):
            raise Illegal("the layers that are shared are not the model's")
        for name, control in down.controls.items():
            if Spec.of(control) != Spec.of(known[name]) or not (control.abs() <= LARGEST).all():
                raise Illegal(f"the control variate of {name} is none of that weight, or beyond {LARGEST:g}")
        weights = dict(down.weights)
        if set(weights) == set(shared):
            for name in known.keys() - set(shared):
                own = client.memory.get(OWN + name)
                if own is None or own.shape != known[name].shape:
                    raise StaleVersion
                weights[name] = own.to(known[name].dtype)
        check_weights(known, weights)
        fill(net, weights)

    def fits(self, net: Net) -> None:
        found, depth = _layers(net.names), len(self._stack(net))
        if len(found) < 2 or max(found) >= depth:
            raise ModelError(
                f"method: {self.name} shares the parameters of some layers, and this view trains those of "
                f'{len(found)}: [model.view] with kind = "prompt" and deep = true, or another view'
            )

    def work(self, round: int) -> Work:
        ranking = self.batch_size * (1 + (6 * self.lanczos if self.share is None else 0)) if round == 1 else 0
        return Work(self.steps, 3 * self.steps * self.batch_size + ranking, self.batch_size)

    def frames(self, at: Expected) -> Frames | None:
        each = dict.fromkeys(_layers(at.trained), 0)
        for name, tensor in at.trained.items():
            if (layer := _layer(name)) is not None:
                each[layer] += tensor.nbytes + len(name)
        order = sorted(each, key=lambda layer: each[layer])
        counts = (1, len(order)) if self.share is None else (_count(self.share, len(order)),) * 2
        sets = [sorted(order[: counts[0]]), sorted(order[len(order) - counts[1] :])]

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            down, up = list[int](), list[int]()
            for layers in sets if round > 1 else [[]]:
                part = {name: at.trained[name] for name in _shared(at.trained, layers)}
                sent = Part(at.trained if new or not layers else part, part, layers, 0.0)
                down.append(at.length(sent, round, client))
                for count in (1, 65535) if at.examples[client] is None else (at.examples[client] or 0,):
                    scores = [] if layers else [0.5] * len(order)
                    up.append(at.length(Ranked(part, scores, 0.5, count, 0.0, 0), round, client, HELD))
            return Span(min(down), max(down)), Span(min(up), max(up))

        return frames

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        if side == "client":  # the start, c_i and what is added to steps
            return training(at, forward, self.optimiser, self.recompute, copies=16 * at.size)
        return averaging(at, self.server_step.kind, copies=8 * at.size)

    def _rank(self, client: Client) -> tuple[list[float], float]:
        """The scores of the layers that hold what is trained, and the ratio, on one batch."""
        net, key = client.net, client.key.fold("rank")
        batch = next(replace(client.data, focus=None).batches(key, self.batch_size))
        scores = layer_scores(net.model, batch, self._stack(net))
        if self.share is not None:
            return [scores[layer] for layer in _layers(net.names)], self.share
        spectrum = density(net.model, batch, [p for _, p in net.parameters()], self.lanczos, key)
        return [scores[layer] for layer in _layers(net.names)], share_above(spectrum)

    def _stack(self, net: Net) -> list[nn.Module]:
        """The model's layers; ModelError where they are not found."""
        return list(net.model.get_submodule(layers_of(net.model, self.layers)).children())

    def _chosen(self, names: Iterable[str], counted: Sequence[Counted]) -> list[int]:
        """The layers to share, by the means of what the clients found."""
        found, total = _layers(names), sum(reply.weight for reply in counted)
        mean = {k: sum(r.weight * r.metrics[k] for r in counted) / total for k in counted[0].metrics}
        best = sorted(range(len(found)), key=lambda i: -mean[f"score {i}"])
        return [found[i] for i in sorted(best[: _count(self.share or mean["ratio"], len(found))])]

    def _corrected(self, net: Net, shifts: Tensors, lr: float, rates: list[float]) -> Adjust:
        """A hand that takes c - c_i out of each step that will be taken, and notes the step's rate."""
        moves = [shifts.get(name) for name in net.names]

        @torch.no_grad()
        def adjust(weights: Sequence[Tensor]) -> None:
            gradients = [w.grad for w in weights if w.grad is not None]
            if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                return  # it is skipped
            rates.append(_rate(lr, self.warmup, len(rates)))
            for weight, move in zip(weights, moves, strict=True):
                if move is not None:
                    weight.sub_(move.to(weight.device), alpha=rates[-1])

        return adjust


def _layer(name: str) -> int | None:
    """The layer that a parameter lies in, by the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return None if found is None else int(found[1])


def _layers(names: Iterable[str]) -> list[int]:
    return sorted({layer for name in names if (layer := _layer(name)) is not None})


def _shared(names: Iterable[str], layers: Sequence[int]) -> list[str]:
    """The names of what is shared; all of them while no layers are chosen."""
    return [name for name in names if not layers or _layer(name) is None or _layer(name) in layers]


def _count(share: float, layers: int) -> int:
    return min(layers, max(1, round(share * layers)))


def _rate(lr: float, warmup: int, step: int) -> float:
    return lr * min(1.0, (step + 1) / (warmup + 1))


def _control(memory: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    own = memory.get(CONTROL + name)
    return torch.zeros(like.shape) if own is None or own.shape != like.shape else own
