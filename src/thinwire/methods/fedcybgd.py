"""FedCyBGD (Wang, Wang and Tang, 2024): clients take turns, and each trains one block of layers in a smaller model.

    a cycle visits D blocks of consecutive layers, in an order; in a turn, for the next block j and the next client i:
    client   downloads a proxy of the model around block j, trains block j alone, uploads w_j' - w_j
    server   w_j <- w_j + a (w_j' - w_j);    the next client starts from there

The proxy (the paper's hybrid compression, section 3.3) is a real smaller model: block j as it is; blocks that this
cycle has not updated yet lose their least important layers; blocks that it has updated stay, with fewer heads and
channels. Beyond the paper, matrices around the block, which do not train, travel in a few bits a weight (`around`).
What the client has seen of a tensor before, or has with the start model, travels as a difference.

A classifier's head (pooler and all else after the layers) trains with every block, as in the paper; beyond it, so do
the layers of the last `common` blocks.

Variants: several clients in a turn train the same block, and the server takes their mean (`relay` with more than one
client a round); or each another one, damped by a (`parallel`); or each the whole model in its turn (`full`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from thinwire import memory
from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.core import Client, Server, StaleVersion
from thinwire.costs.differences import coded_bits
from thinwire.costs.frames import Expected, Frames, Span
from thinwire.costs.memory import FROZEN, RUNTIME, Memory, Side, exact_coding, holding, moments_of
from thinwire.costs.sketch import Pass, Sketch, Work, within_layers
from thinwire.keys import Key
from thinwire.model import autocast, importance, shrink
from thinwire.model.anatomy import Width
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.shrink import Cut
from thinwire.train.blocks import Blocks
from thinwire.train.objective import loss as batch_loss
from thinwire.train.proxy import Coder
from thinwire.train.versions import Exact, coded, layout
from thinwire.train.weights import fill
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST, check_rate
from thinwire.wire.payload import LATE, LazyTensors, Spec, specs_of

Tensors = Mapping[str, Tensor]
STEPS = (1.0, 0.5, 0.25, 0.0)  # of which a server that checks takes the best
EACH = -2  # the block of what trains with every block
ROWS, LENGTH = 8, 128  # of the text that importance is measured on, where the server has no rows of its own


@dataclass(frozen=True)
class Relay:
    """The weights, and how far the cycle is: blocks that are left, layers that it has updated, layers ever updated.

    `key` draws what clients are not shown. `member` says for each tensor which block it belongs to, -1 for none,
    EACH for every one.
    `scores` is each layer's importance; `parts` has that of each layer's heads and channels, "heads.3", float32.
    `moments` is the memory of the server's step.
    """

    KIND: ClassVar[str] = "State"

    weights: Tensors
    key: int
    member: list[int]
    left: list[int]
    updated: list[int]
    ever: list[int]
    scores: list[float]
    parts: Tensors
    moments: Tensors | None = field(default=None, metadata=LATE)


@dataclass(frozen=True)
class Proxy:
    """A smaller model around a block: what is left of each tensor, coded (uint8) or raw, by the whole model's names.

    `cut` says which layers, heads and channels those are. `base` is the version of an earlier proxy that the client
    holds: tensors that have their shape in it travel as differences to it. `model` says whose weights they are. Of
    matrices that are not the block's there are few bits, uint8 in either case.
    """

    model: str
    block: int
    cut: Tensors
    base: str | None
    version: str
    changes: Tensors
    lr: float


@dataclass(frozen=True)
class Block:
    """A client's difference to the block that it received, coded or raw; examples, loss, skipped as in FedAvg."""

    block: int = field(metadata={"release": True})
    changes: Tensors = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


class FedCyBGD(Exact):
    """Clients take turns; each trains one block, in a smaller model around it."""

    name: Literal["fedcybgd"] = "fedcybgd"
    lr: float = Field(1e-5, gt=0, le=100)
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    blocks: PositiveInt = 10
    order: Literal["ascending", "descending", "random", "importance"] = "ascending"
    extra: tuple[Literal["embeddings", "head"], ...] = ()  # blocks of their own for what is in no layer
    common: NonNegativeInt = 1  # last blocks of layers that train in every turn
    variant: Literal["relay", "parallel", "full"] = "relay"
    damping: float = Field(1.0, gt=0, le=1)  # a
    # both cost more loss than a hundredth where answers are text, so neither is done unless asked for
    drop: float = Field(0.0, ge=0, lt=1)  # of all layers, of those that are not updated yet
    prune: float = Field(0.0, ge=0, lt=1)  # of the heads and channels of updated layers
    importance: Literal["influence", "perplexity", "taylor"] = "influence"
    spared: tuple[NonNegativeInt, NonNegativeInt] = (4, 2)  # first and last layers that are never dropped
    shown: float = Field(1.0, ge=0, le=1)  # of updated layers; the others travel as at the start (the published code)
    veiled: bool = (
        False  # which layers are not shown is drawn once a client: those it sees only when they are its block
    )
    around: Literal["exact", "8bit", "7bit", "6bit", "4bit"] = "7bit"  # how matrices that are not the block's travel
    coded: bool = True
    choose_step: bool = False  # take the best of steps 1, 1/2, 1/4 and 0 by the loss on the server's rows
    layers: str | None = None  # where the model's layers are; found where it is None

    Down, Up, State = Proxy, Block, Relay
    paper: ClassVar[str] = "Wang, Wang and Tang 2024, arXiv:2406.11187"
    hollow: ClassVar[bool] = True
    keeps: ClassVar[bool] = False
    versions_each: ClassVar[int] = 1

    def init(self, server: Server) -> Relay:
        if self.choose_step and server.data is None:
            raise ModelError("method.choose_step: needs rows at the server, data.public")
        weights = {name: self.start_of(server.net, name) for name in server.net.names}
        at = self._blocks(server.net)
        member = [
            EACH if name in at.each else next((b for b, own in enumerate(at.names) if name in own), -1)
            for name in weights
        ]
        return self._cycle(Relay(weights, server.key.fold("shown").word(), member, [], [], [], [], {}), server)

    def broadcast(self, state: Relay, server: Server, client_id: int, held: str | None) -> Proxy:
        net, at = server.net, self._blocks(server.net)
        block = state.left[client_id % len(state.left) if self.variant == "parallel" else 0]
        cut, hidden = self._cut(state, at, block), self._hidden(state, at, block, server, client_id)
        known = server.versions.get(held) if held is not None else None
        changes, sent, own, coder = dict[str, Tensor](), dict[str, Tensor](), {*at.names[block]}, self._coder
        for name, weights in state.weights.items():
            source = self.start_of(net, name) if at.layer(name) in hidden else weights
            if (part := shrink.sliced(name, source, cut, at.layout)) is not None:
                base = self._base(net, known, name, Spec.of(part), cut, at, name in own) if self.coded else None
                changes[name], sent[name] = coder.encode(part, base, name in own)
        known_as = held if known is not None else None
        model, version = layout(specs_of(state.weights)), server.versions.put(sent)  # only now: it may push out `known`
        return Proxy(model, block, cut.packed(), known_as, version, changes, self.rate(server))

    def client_update(self, down: Proxy, client: Client) -> Block:
        check_rate(down.lr)
        net, at = client.net, self._blocks(client.net)
        mine = layout({name: Spec(self.held_dtype(p.dtype), tuple(p.shape)) for name, p in net.parameters()})
        if down.model != mine:
            raise Illegal(f"the server's model is {down.model}, this client's {mine}")
        if not 0 <= down.block < len(at.names):
            raise Illegal(f"there is no block {down.block}")
        known = client.versions.get(down.base) if down.base is not None else None
        if down.base is not None and known is None:
            raise StaleVersion
        parts = self._decoded(down, net, known, at)
        if client.versions.put(parts) != down.version:
            raise Illegal(f"the changes do not make the version {down.version:.12}")
        client.held = down.version
        cut, own = Cut.unpacked(down.cut, at.layout), at.names[down.block]
        place = "cpu" if net.device.type == "meta" else net.device
        given = {}
        for name in list(parts):  # one by one, or there would be twice as much
            # a copy, for torch's own memory is aligned, and a product's rounding may depend on that
            given[str(shrink.renamed(name, cut, at.layout))] = parts.pop(name).to(
                place, net.parameter(name).dtype, copy=True
            )
        model = shrink.proxy(type(net.model), net.model.config, cut, given, at.layout.path)
        autocast.round_products(model, autocast.are_rounded(net.model))
        weights = dict(model.named_parameters())
        trained = [weights[str(shrink.renamed(name, cut, at.layout))] for name in own]
        for parameter in weights.values():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        memory.trim()  # decoding has left much that training would add to
        local = self.train(client, down.lr, model, trained, own, keep=True)
        # read again: in memory while the block trains, it would be as much as the block
        if (start := client.versions.get(down.version)) is None:
            raise Illegal(f"the version {down.version:.12} was lost during the visit")
        key, changes = client.key.fold("code").word(), {}
        for i, (name, master) in enumerate(zip(own, local.weights, strict=True)):
            target = master.detach().float().cpu()
            if not torch.isfinite(target).all():
                raise Illegal(f"the update of {name} is not finite")
            old = start[name]
            new = self.rounded(target, old.dtype, key, i)
            changes[name] = coded(new, old) if self.coded else new
        return Block(down.block, changes, len(client.data), local.loss, local.skipped)

    def check(self, state: Relay, client_id: int, up: Block) -> None:
        if up.block not in state.left:
            raise Illegal(f"block {up.block} is not one that this cycle has left")
        own = [name for name, block in zip(state.weights, state.member, strict=True) if block in (up.block, EACH)]
        if list(up.changes) != own:
            raise Illegal(f"the names of the changes are not those of block {up.block}")
        for name, new in self._answered(state, up):
            if not ((new.float() - state.weights[name].float()).abs() <= LARGEST).all():
                raise Illegal(f"the difference of {name} is beyond {LARGEST:g} or not finite")

    def update(self, state: Relay, server: Server, up: Block) -> Update:
        specs = specs_of(state.weights)

        def read(name: str) -> Tensor:
            return self._coder.exact(up.changes[name], name, state.weights[name], specs[name])

        tensors = LazyTensors({name: specs[name] for name in up.changes}, read)
        return Update(tensors, self.weight(up), up.loss, up.skipped, {"block": up.block})

    def origin(self, state: Relay) -> Mapping[str, Tensor]:
        return state.weights

    def step(
        self, state: Relay, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Relay, Metrics]:
        at, weights = self._blocks(server.net), dict(state.weights)
        blocks, moments = {int(reply.metrics["block"]) for reply in counted}, dict(state.moments or {})
        if not self.server_step.plain:
            for name, tensor in mean.items():
                old = weights[name].float()
                move, entries = self.server_step(moments, name, tensor - old)
                mean[name], moments = old + move, moments | entries
        key, order = server.key.fold("code").word(), {name: i for i, name in enumerate(weights)}

        def moved(step: float) -> dict[str, Tensor]:
            return {  # a whole step ends where the mean is, to the bit
                name: self.rounded(
                    weights[name].float().lerp(target, step * self.damping), weights[name].dtype, key, order[name]
                )
                for name, target in mean.items()
            }

        step, after = 1.0, moved(1.0)
        if self.choose_step:
            fill(server.net, weights)
            losses = {step: self._loss(server, moved(step)) for step in STEPS}
            step = min(STEPS, key=lambda step: losses[step] if math.isfinite(losses[step]) else math.inf)
            after = moved(step)
        layers = {layer for block in blocks for layer in at.trained(block)}
        state = replace(
            state,
            weights=weights | after,
            left=[block for block in state.left if block not in blocks],
            updated=sorted(layers.union(state.updated)),
            ever=sorted(layers.union(state.ever)),
            moments=moments or None,
        )
        metrics = {"block": float(min(blocks)), "step": step * self.damping}
        return (state if state.left else self._cycle(state, server)), metrics

    def materialise(self, state: Relay, net: Net) -> None:
        fill(net, state.weights)

    @property
    def _coder(self) -> Coder:
        return Coder(self.around, self.coded)

    def _blocks(self, net: Net) -> Blocks:
        if self.variant == "full":
            return Blocks.whole(net, self.layers)
        return Blocks.of(net, self.layers, self.blocks, self.common, self.extra)

    def _cycle(self, state: Relay, server: Server) -> Relay:
        """The state at the start of a cycle: an order, and in the first one importance, on the weights as they are.

        It is not measured again: other channels would stay of every narrowed layer each time, and a client that returns
        would have to receive all of them anew.
        """
        at, net = self._blocks(server.net), server.net
        scores, parts = state.scores, dict(state.parts)
        if ((self.drop and self.variant != "full") or self.order == "importance") and not scores:
            fill(net, state.weights)
            scores = getattr(importance, self.importance)(net.model, at.layout.path, self._text(server))
        if self.prune and self.variant != "full" and not parts:
            fill(net, state.weights)
            try:
                worth = importance.groups(net.model, at.layout.path, self._text(server))
            except ValueError as error:
                raise ModelError(f"method.prune: {error}") from None
            for layer, (heads, channels) in enumerate(worth):
                parts |= {f"heads.{layer}": heads, f"channels.{layer}": channels}
        left = list(range(len(at.names)))
        if self.order == "descending":
            left.reverse()
        elif self.order == "random":
            left = server.key.fold("order").permutation(len(left)).tolist()
        elif self.order == "importance":
            means = [sum(scores[layer] for layer in run) / len(run) for run in at.layers]
            left.sort(key=lambda block: -means[block] if block < len(means) else 0.0)
        return replace(state, left=left, updated=[], scores=scores, parts=parts)

    def _cut(self, state: Relay, at: Blocks, block: int) -> Cut:
        """What is left of the model around a block."""
        own = at.trained(block)
        updated, (first, last) = set(state.updated) - own, self.spared
        free = [n for n in range(first, at.depth - last) if n not in own and n not in updated]
        count = min(round(self.drop * at.depth), len(free)) if self.variant != "full" else 0
        gone = importance.drop(state.scores, free, count) if count else ()
        widths = {}
        if self.prune and self.variant != "full":
            heads, channels = ({n: state.parts[f"{what}.{n}"] for n in updated} for what in ("heads", "channels"))
            widths = {
                n: Width(importance.keep(heads[n], self.prune), importance.keep(channels[n], self.prune))
                for n in updated
            }
        return Cut(tuple(n for n in range(at.depth) if n not in gone), widths)

    def _hidden(self, state: Relay, at: Blocks, block: int, server: Server, client_id: int) -> set[int]:
        """Updated layers that the client receives as they were at the start."""
        own = at.trained(block)
        if self.veiled:
            order = Key.root(state.key).fold("client", client_id).permutation(at.depth).tolist()
            others = [n for n in order[: at.depth - math.ceil(self.shown * at.depth)] if n in state.ever]
        else:
            others = [n for n in state.ever if n not in own]
            order = server.key.fold("shown").permutation(len(others)).tolist()
            others = [others[i] for i in order[: len(others) - math.ceil(self.shown * len(others))]]
        return {*others} - own

    def _base(
        self, net: Net, known: Tensors | None, name: str, like: Spec, cut: Cut, at: Blocks, own: bool
    ) -> Tensor | None:
        """What both ends hold of a tensor that is to be sent, if anything."""
        # what was around another block is rough, and an exact tensor nearer to the start model's
        exact = self._coder.coarse(like.shape, own=False) is None or name in at.each
        rough = own and self.start == "shared" and not exact
        if known is not None and name in known and not rough:
            old: Tensor | None = known[name]
            if known[name].shape == net.parameter(name).shape:  # whole then, and perhaps narrower now
                old = shrink.sliced(name, known[name], cut, at.layout)
            if old is not None and Spec.of(old) == like:
                return old
        return shrink.sliced(name, self.start_of(net, name), cut, at.layout) if self.start == "shared" else None

    def _decoded(self, down: Proxy, net: Net, known: Tensors | None, at: Blocks) -> dict[str, Tensor]:
        """The tensors of the proxy, by their names in the whole model."""
        try:
            cut = Cut.unpacked(down.cut, at.layout)
        except ValueError as error:
            raise Illegal(str(error)) from None
        if not at.trained(down.block) <= {*cut.layers} - {*cut.widths}:
            raise Illegal(f"the cut leaves block {down.block} not whole")
        specs = {
            name: Spec(self.held_dtype(p.dtype), shape)
            for name, p in net.parameters()
            if (shape := shrink.shape_of(name, p.shape, cut, at.layout)) is not None
        }
        if list(down.changes) != list(specs):
            raise Illegal("the names of the changes are not those of the proxy")
        own, found = {*at.names[down.block]}, dict[str, Tensor]()
        for name, spec in specs.items():
            base = self._base(net, known, name, spec, cut, at, name in own)
            found[name] = self._coder.decode(down.changes[name], name, base, spec, name in own)
        return found

    def _answered(self, state: Relay, up: Block) -> Iterable[tuple[str, Tensor]]:
        """The block's tensors as the client has trained them, one after another."""
        for name, change in up.changes.items():
            old = state.weights[name]
            yield name, self._coder.exact(change, name, old, Spec.of(old))

    def _loss(self, server: Server, weights: Tensors) -> float:
        """The mean loss of the net on the server's rows, with these weights in it."""
        assert server.data is not None  # `init` has seen to it
        with torch.no_grad():
            for name, tensor in weights.items():
                server.net.parameter(name).copy_(tensor)
            losses = (
                len(examples) * batch_loss(server.net.model, batch).item()
                for batch, examples in server.data.in_order(self.batch_size)
            )
            return sum(losses) / len(server.data)

    def _text(self, server: Server) -> list[Tensor]:
        """What importance is measured on: the server's rows, or a public text."""
        if server.data is not None:
            rows = [[*e.prompt, *e.answer][:LENGTH] for e in server.data.examples[:ROWS]]
        else:
            text = resources.files("thinwire.model").joinpath("calibration.txt").read_text(encoding="utf-8")
            tokens = server.net.tokenizer(text)["input_ids"][: ROWS * LENGTH]
            rows = [tokens[low : low + LENGTH] for low in range(0, len(tokens), LENGTH)]
        return [torch.tensor([row], device=server.net.device) for row in rows if len(row) > 1]

    def fits(self, net: Net) -> None:
        if len(net.names) < sum(1 for _ in net.model.parameters()):
            raise ModelError("model.lora: fedcybgd builds smaller models of plain layers, without adapters")
        at = self._blocks(net)
        (first, last), wanted = self.spared, round(self.drop * at.depth)
        most = max(len({*range(first, at.depth - last)} - at.trained(block)) for block in range(len(at.names)))
        if self.variant != "full" and wanted > most:
            raise ModelError(
                f"method.drop: {wanted} of {at.depth} layers are more than the {most} that can be dropped: the first "
                f"{first} and the last {last} (method.spared) and those that train stay"
            )

    def work(self, round: int) -> Work:
        return super().work(round)._replace(rows=math.nan)  # a pass through a proxy is not one through the model

    def frames(self, at: Expected) -> Frames | None:
        """A turn's block, and the proxy around it: what has changed of it, a block for each turn that has been."""
        dtype = self.held_dtype(next(iter(at.trained.values())).dtype)
        values, inside = sum(t.numel() for t in at.trained.values()), within_layers(at.trained)
        block = inside / self.blocks
        # in the turn of one of the last blocks, and in any other
        few, own = max(1, self.common) * block, min(self.blocks, self.common + 1) * block
        if self.variant == "full":
            few = own = values
        whole = 8.0 * dtype.itemsize
        low, high = whole, whole
        if self.coded:
            low, high = coded_bits(self.lr, self.steps, self.optimiser, dtype, self.rounding == "stochastic")
        around = whole if self.around == "exact" else int(self.around[0]) + 1 / 8
        names = sum(len(name) + 8 for name in at.trained)
        slack = 4 * names  # what a coder puts in front of each tensor

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            up = Span(low * few / 8, high * own / 8 + slack)
            if not self.coded or (new and self.start == "sent"):
                left = max(values - self.drop * inside - few, 0)
                least = few * whole + (1 - self.prune) * left * around
                most = own * whole + (values - own) * around
                return Span((0.6 if self.coded else 1.0) * least / 8, most / 8 + slack), up
            turns = min(round - 1, self.blocks)
            rough = self.around != "exact" and self.start == "sent"  # what a client has of a block not its own
            most = min(high, around) * block * turns + (whole if rough else high) * own
            return Span(names / 8, most / 8 + slack), up

        return frames

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        inside, trained = within_layers(at.trained), min(self.blocks, 1 + self.common)  # blocks of most turns
        full = self.variant == "full"
        if side == "server":
            mean = 4 * at.size * trained // self.blocks if self.variant == "relay" else 4 * at.size
            return holding(at, at.size * self.held_dtype(at.dtype).itemsize + mean, exact_coding(at))
        dropped, block = (0.0, at.size) if full else (self.drop, inside * trained // self.blocks)
        return Memory(
            at.weight_bytes - int(dropped * inside) * at.dtype.itemsize,
            block * at.dtype.itemsize,
            moments_of(self.optimiser, block, at.dtype),
            int((1 - dropped) * (1.0 if full else FROZEN) * forward.kept),
            RUNTIME + at.largest_bytes,
        )
