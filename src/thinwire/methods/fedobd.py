"""FedOBD (Chen et al., 2022): of what a client has learnt, the blocks that changed most travel, in adaptive few bits.

Each transformer layer is a block, and so is each module beside the layers; P weights are trained. Client i has v_b of
block b from the server, and has trained w_b. In stage one, the first `stage_one` rounds:

    MBD(b) = |w_b - v_b|_2 / |b|    by falling MBD, b is kept while all that is kept is (1 - dropout) P at most
    up       Q(w_b - v_b), a tensor at a time, of the blocks that are kept
    server   w <- w + s(mean_i d_i)        and to the next clients  v = w0 + Q(w - w0)

A block that does not fit is passed over, and smaller ones are still tried. Stage two: all blocks, after fewer local
steps, `stage_two_steps`; the rate goes on as scheduled. The paper aggregates there after each of an epoch's ten, here a
round is one; that all clients take part in it is set by the run's [[cohort]]; the paper lets stage one end early where
it no longer gets better, here it does not.

Q is NNADQ (compress/codecs/nnadq.py). What the paper sends down is Q(w), `down = "weights"`. By default it is the
change from the start model, which every site has: fine-tuning moves weights by less than the levels of whole weights
lie apart. What Q loses is not sent later. `codec = "none"`: whole weights both ways, and without dropout it is FedAvg.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import stepped
from thinwire.compress.codecs.nnadq import Nnadq
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, Span
from thinwire.costs.sketch import Work
from thinwire.model.blocks import modules_of
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder
from thinwire.train.weights import Trained, check_weights, fill, fill_checked
from thinwire.wire import Illegal, LazyTensors
from thinwire.wire.legal import LARGEST, check_rate
from thinwire.wire.payload import Spec, specs_of

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cached:
    """The server's weights, the code of each that is sent, uint8 (or none), the next stage, its step's memory."""

    weights: Tensors
    codes: Tensors
    stage: int
    moments: Tensors | None = None


@dataclass(frozen=True)
class Sent:
    """The code of each tensor, uint8, or the tensor itself; which stage it is."""

    weights: Tensors
    stage: int
    lr: float


@dataclass(frozen=True)
class Kept(Trained):
    """Of the blocks that a client keeps each tensor's coded change, uint8, or itself; the rest as in FedAvg."""


class FedOBD(FirstOrder):
    """Local first-order steps; the blocks that changed most travel up, all come down, in as few bits as they are worth.

    `unsent`: what a block counts as that a client has not sent. "cached", the default and the published code's: as the
    server has it, so that those who sent it move it by their share of all. "senders": as nothing, so that it moves by
    the mean of those who sent it, which is further.
    """

    name: Literal["fedobd"] = "fedobd"
    dropout: float = Field(0.3, ge=0, lt=1)  # lambda: the share of the weights that a client drops, at least
    unsent: Literal["cached", "senders"] = "cached"
    codec: Literal["nnadq", "none"] = "nnadq"
    coarseness: PositiveFloat = 1e-4  # of nnadq: more saves bits; the paper's for text, 1e-3 for images
    down: Literal["change", "weights"] = "change"  # what nnadq codes for the clients
    stage_one: PositiveInt = 100  # rounds; those after them are stage two
    stage_two_steps: PositiveInt | None = None  # None: a fifth of `steps`, as the paper has 1 epoch for 5

    Down, Up, State = Sent, Kept, Cached
    paper: ClassVar[str] = "Chen et al. 2022, arXiv:2208.05174"
    keeps: ClassVar[bool] = False

    def init(self, server: Server) -> Cached:
        return self._cached({name: server.net.base[name].cpu() for name in server.net.names}, server.net, 1)

    def broadcast(self, state: Cached, server: Server, client_id: int, held: str | None) -> Sent:
        return Sent(state.codes or state.weights, state.stage, self.rate(server))

    def client_update(self, down: Sent, client: Client) -> Kept:
        self.receive(down, client)
        net, plain = client.net, self.codec == "none"
        local = self.train(client, down.lr, keep=True, steps=self._steps(down.stage))
        trained = [p for _, p in net.parameters()] if plain else local.weights
        after = {name: weight.detach().cpu() for name, weight in zip(net.names, trained, strict=True)}
        before = down.weights if plain else self._held(net, down.weights)
        blocks, moved = modules_of(after), list[float]()
        for own in blocks:
            square = sum(float((after[n].double() - before[n].double()).square().sum()) for n in own)
            if not math.isfinite(square):
                raise Illegal(f"the update of {own[0]} or another of its block is not finite")
            moved.append(math.sqrt(square) / sum(after[name].numel() for name in own))
        sizes = [sum(after[name].numel() for name in own) for own in blocks]
        names = {name for block in kept(moved, sizes, self._room(sizes, down.stage)) for name in blocks[block]}
        sent = {name: t if plain else self._coded(t, before[name]) for name, t in after.items() if name in names}
        return Kept(sent, len(client.data), local.loss, local.skipped)

    def check(self, state: Cached, client_id: int, up: Kept) -> None:
        whole = [name for own in modules_of(state.weights) if own[0] in up.weights for name in own]
        if not whole or sorted(up.weights) != sorted(whole):
            raise Illegal("the names of the weights are not those of whole blocks")
        sizes = {name: tensor.numel() for name, tensor in state.weights.items()}
        if sum(sizes[name] for name in up.weights) > self._room(sizes.values(), state.stage):
            raise Illegal(f"the blocks hold more weights than a dropout of {self.dropout:g} leaves")
        if self.codec == "none":
            check_weights({name: state.weights[name] for name in up.weights}, up.weights)
            return
        for name, code in up.weights.items():
            self._change(code, name, state.weights[name].shape)

    def update(self, state: Cached, server: Server, up: Kept) -> Update:
        def read(name: str) -> Tensor:
            old = state.weights[name]
            if self.codec == "none" or name not in up.weights:
                return up.weights.get(name, old)
            return old.float() + self._change(up.weights[name], name, old.shape)

        specs = specs_of(state.weights)
        share = sum(specs[name].nbytes for name in up.weights) / sum(spec.nbytes for spec in specs.values())
        counts = {name: spec for name, spec in specs.items() if self.unsent == "cached" or name in up.weights}
        return Update(LazyTensors(counts, read), self.weight(up), up.loss, up.skipped, {"kept": share})

    def origin(self, state: Cached) -> Mapping[str, Tensor]:
        return state.weights

    def step(
        self, state: Cached, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Cached, Metrics]:
        after, moments = stepped(self.server_step, state.weights, mean, state.moments)
        weights = {name: after.get(name, old) for name, old in state.weights.items()}  # nobody may have sent a block
        stage = 1 if server.round < self.stage_one else 2
        memory = {**(state.moments or {}), **(moments or {})} or None
        share = sum(reply.metrics["kept"] for reply in counted) / len(counted)
        return replace(self._cached(weights, server.net, stage), moments=memory), {"kept": share}

    def materialise(self, state: Cached, net: Net) -> None:
        fill(net, self._held(net, state.codes) if state.codes else state.weights)

    def receive(self, down: Sent, client: Client) -> None:
        check_rate(down.lr)
        if down.stage not in (1, 2):
            raise Illegal(f"there is no stage {down.stage}")
        if self.codec == "none":
            fill_checked(client.net, down.weights)
        elif set(down.weights) != set(client.net.names):
            raise Illegal("the names of the weights are not the model's")
        else:
            fill(client.net, self._held(client.net, down.weights))

    def _cached(self, weights: Tensors, net: Net, stage: int) -> Cached:
        if self.codec == "none":
            return Cached(weights, {}, stage)
        return Cached(weights, {n: self._coded(w, self._origin(net, n)) for n, w in weights.items()}, stage)

    def _held(self, net: Net, codes: Tensors) -> LazyTensors:
        """The weights that the codes mean, in the net's dtypes, each decoded when it is asked for."""
        specs = {name: Spec(p.dtype, tuple(p.shape)) for name, p in net.parameters()}

        def read(name: str) -> Tensor:
            origin = self._origin(net, name)
            return (origin.float() + self._change(codes[name], name, origin.shape)).to(specs[name].dtype)

        return LazyTensors(specs, read)

    def _origin(self, net: Net, name: str) -> Tensor:
        """What a tensor's code is the change from."""
        start = net.base[name].cpu()
        return start if self.down == "change" else torch.zeros_like(start)

    def _coded(self, after: Tensor, before: Tensor) -> Tensor:
        return to_tensor(Nnadq(self.coarseness).encode(after.float() - before.float(), 0))

    def _change(self, code: Tensor, name: str, shape: Sequence[int]) -> Tensor:
        """What a code is of, float32; Illegal where it is none, or too large."""
        try:
            found = Nnadq(self.coarseness).decode(to_bytes(code), shape, 0)
        except ValueError as error:
            raise Illegal(f"{name}: {error}") from None
        if not (found.abs() <= LARGEST).all():
            raise Illegal(f"the change of {name} is beyond {LARGEST:g}")
        return found

    def _steps(self, stage: int) -> int:
        return self.steps if stage == 1 else self.stage_two_steps or max(1, self.steps // 5)

    def _room(self, sizes: Iterable[int], stage: int) -> float:
        """How many weights a client may send."""
        return (1 - self.dropout if stage == 1 else 1) * sum(sizes)

    def fits(self, net: Net) -> None:
        sizes = [sum(net.parameter(name).numel() for name in own) for own in modules_of(net.names)]
        if (least := min(sizes)) > (room := self._room(sizes, 1)):
            raise ModelError(
                f"method.dropout: {self.dropout:g} leaves {math.floor(room):,} of {sum(sizes):,} weights, and the "
                f"smallest block has {least:,}"
            )

    def work(self, round: int) -> Work:
        steps = self._steps(1 if round <= self.stage_one else 2)
        return Work(steps, 3 * steps * self.batch_size, self.batch_size)

    def frames(self, at: Expected) -> Frames | None:
        code = Nnadq(self.coarseness)
        sizes = [sum(at.trained[name].numel() for name in own) for own in modules_of(at.trained)]
        # how far a weight moves in a visit: AdamW's steps are of the rate's size, the clipping bounds others'
        step = 1.5 if self.optimiser == "adamw" else self.clip or math.inf
        most = min(1.5, step * self.lr * self.steps)

        def span(
            make: Callable[[Tensors], Any],
            low: float,
            high: float,
            shares: tuple[float, float],
            round: int,
            client: int,
        ) -> Span:
            """A frame of tensors of which these shares travel, and whose ranges lie between these."""
            ends = list[float]()
            for range_, share in zip((low, high), shares, strict=True):
                tensors = dict(at.trained)
                if self.codec != "none":
                    lengths = {name: code.size(tensor.numel(), range_) for name, tensor in tensors.items()}
                    tensors = {n: torch.empty(m, dtype=torch.uint8, device="meta") for n, m in lengths.items()}
                head = at.length(make({}), round, client)
                ends.append(head + share * (at.length(make(tensors), round, client) - head))
            few, many = shares
            slack = 0 if few == many == 1 else sum(len(name) + 16 for name in at.trained)
            return Span(ends[0] - slack, ends[1] + slack)

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            stage, held = 1 if round <= self.stage_one else 2, at.examples[client]
            room = self._room(sizes, stage)
            shares = (1.0, 1.0) if room == sum(sizes) else (max(0, room - max(sizes)) / sum(sizes), room / sum(sizes))
            ends = [
                span(partial(Kept, examples=n, loss=0.0, skipped=0), 0.1 * self.lr, most, shares, round, client)
                for n in ((1, 65535) if held is None else (held,))
            ]
            low, high = (0.0, most * (round - 1)) if self.down == "change" else (1e-2, 10.0)
            if not self.server_step.plain and round > 1:
                high = max(high, 1.0)
            down = span(lambda sent: Sent(sent, stage, 0.0), low, high, (1.0, 1.0), round, client)
            return down, Span(ends[0].least, ends[-1].most)

        return frames


def kept(moved: Sequence[float], sizes: Sequence[int], room: float) -> list[int]:
    """The blocks to keep, by how much they moved in the mean: those that have room, first come first."""
    found, held = list[int](), 0
    for block in sorted(range(len(sizes)), key=lambda block: -moved[block]):
        if held + sizes[block] <= room:
            found.append(block)
            held += sizes[block]
    return found
