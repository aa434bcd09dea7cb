"""Weights that products of factors are merged into, round by round: every peer holds the same bits of them.

    W <- W + scale sum_j c_j b_j a_j^T          of each layer; a_j, b_j: rows of all clients' factors, c_j their shares

in float64, rounded once, to W's dtype; in the order of j, so that a sum is the same on any CPU. What travels are the
rows and shares of the rounds that a peer has missed, of a layer the weights where these are shorter; who has missed
more than is as long as all these weights receives the weights. The start is nobody sent: all have the start model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from thinwire.aggregate.products import Pair, added
from thinwire.core import Client, Server, StaleVersion
from thinwire.costs.frames import VERSION, Expected, Frames, Span
from thinwire.costs.memory import Memory, Side, averaging, training
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train.products import places
from thinwire.wire import Illegal
from thinwire.wire.legal import check_rate

Tensors = Mapping[str, Tensor]
SHARES = "shares"
MISSED = 7  # rounds that a peer may be behind: of its own versions it keeps eight


class Layer(NamedTuple):
    """Where products are merged into: the weight's name, the factors' scale, whether the weight lies turned over."""

    weight: str
    scale: float
    turned: bool


@dataclass(frozen=True)
class Merged:
    """The factors; the weights below them, their version, the start's, and how they came of the versions before.

    `stacks`: what each of the last rounds has added, under ROUND/LAYER/left, /right (or /weight, as it then was) and
    ROUND/shares; `bases`: the version that each began from, oldest first.
    """

    factors: Tensors
    weights: Tensors
    version: str
    start: str
    stacks: Tensors
    bases: list[str]


@dataclass(frozen=True)
class Merge:
    """How to come from the weights of the version `base`, None: the start, to `version`; or all the `weights`."""

    weights: Tensors
    base: str | None
    version: str
    stacks: Tensors
    rounds: int
    lr: float


def begun(server: Server) -> Merged:
    """The start."""
    weights = _start(server.net)
    version = server.versions.put(weights)
    return Merged({n: server.net.base[n] for n in server.net.names}, weights, version, version, {}, [])


def layers_of(net: Net) -> dict[str, Layer]:
    """The layers with factors, by name."""
    return {
        name: Layer(place.weight, place.scale, isinstance(net.model.get_submodule(name).base_layer, Conv1D))
        for name, place in net.adapted().items()
    }


def check_merges(net: Net) -> None:
    """ModelError for a net whose weights products cannot be merged into: a quantised one, for one."""
    for layer in layers_of(net).values():
        try:
            net.base[layer.weight]
        except ModelError as error:
            raise ModelError(f"model: its weights are to change, and {error}") from None


def merged(state: Merged, server: Server, products: Mapping[str, Pair], shares: Tensor) -> Merged:
    """The state with one round more: each layer's rows of `products`, and how much each counts."""
    after, stack = dict(state.weights), {SHARES: shares.double()}
    for name, layer in layers_of(server.net).items():
        pair, old = products[name], state.weights[layer.weight]
        after[layer.weight] = _moved(old, layer, pair, shares)
        if nbytes(pair) < nbytes([old]):
            stack |= {f"{name}/left": pair.left, f"{name}/right": pair.right}
        else:
            stack[f"{name}/weight"] = after[layer.weight]
    version = server.versions.put(after)
    if version == state.version:
        return state
    rounds = [*_rounds(state.stacks, len(state.bases)), stack]
    bases = [*state.bases, state.version]
    most = nbytes(after.values())
    while sum(nbytes(round.values()) for round in rounds) > most:
        rounds, bases = rounds[1:], bases[1:]
    return replace(state, weights=after, version=version, stacks=_numbered(rounds), bases=bases)


def way(state: Merged, held: str | None, lr: float) -> Merge:
    """What a peer is sent that holds this version, None: the start; the shorter of the rounds missed and of all."""
    if held is not None and held != state.version and held not in state.bases[-MISSED:]:
        held = None  # as one who is new
    known = held or state.start
    if known == state.version:
        return Merge({}, held, state.version, {}, 0, lr)
    if known in state.bases:
        rounds = _rounds(state.stacks, len(state.bases))[state.bases.index(known) :]
        return Merge({}, held, state.version, _numbered(rounds), len(rounds), lr)
    return Merge(state.weights, None, state.version, {}, 0, lr)


def follow(down: Merge, client: Client) -> None:
    """Bring the client's net to that version, and keep it. StaleVersion: its base is not held; Illegal: no such way."""
    check_rate(down.lr)
    layers = layers_of(client.net)
    weights = dict(down.weights)
    if not weights:
        held: Tensors | None = _start(client.net) if down.base is None else client.versions.get(down.base)
        if held is None or set(held) != {layer.weight for layer in layers.values()}:
            raise StaleVersion
        weights = dict(held)
    if not 0 <= down.rounds <= (0 if down.weights else len(down.stacks)):
        raise Illegal(f"{down.rounds} rounds of {len(down.stacks)} tensors")
    for stack in _rounds(down.stacks, down.rounds):
        for name, layer in layers.items():
            whole = stack.get(f"{name}/weight")
            if whole is not None:
                if whole.shape != weights[layer.weight].shape:
                    raise Illegal(f"{layer.weight} is {list(whole.shape)}, not {list(weights[layer.weight].shape)}")
                weights[layer.weight] = whole
                continue
            try:
                pair, shares = Pair(stack[f"{name}/left"], stack[f"{name}/right"]), stack[SHARES]
            except KeyError as error:
                raise Illegal(f"a round's products lack {error}") from None
            _check(pair, shares, weights[layer.weight], layer)
            weights[layer.weight] = _moved(weights[layer.weight], layer, pair, shares)
    fill_merged(client.net, weights)
    if client.versions.put(weights) != down.version:
        raise Illegal(f"the products do not make the version {down.version:.12}")
    client.held = down.version


def fill_merged(net: Net, weights: Tensors) -> None:
    """Copy the merged weights into the net; Illegal where they are not its own."""
    known = {layer.weight for layer in layers_of(net).values()}
    if set(weights) != known:
        raise Illegal("the names of the merged weights are not the model's")
    for name in known:
        if weights[name].shape != net.base[name].shape or weights[name].dtype != net.base[name].dtype:
            raise Illegal(f"{name} is {weights[name].dtype} {list(weights[name].shape)}, which the model's is not")
        net.write(name, weights[name])


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def expected(at: Expected, rows: Sequence[int], down: Callable[[Merge], Any], up: Callable[[int, int], Any]) -> Frames:
    """The frames before a run where all reply and each round moves the weights: as long as they will be, to the byte.

    `rows`: how many each round's stacks have; `down` makes the broadcast that holds a way, `up` the reply of a client
    with so many examples.
    """
    weights, rounds = _expected(at.trained, rows)
    most = nbytes(weights.values())

    def way(round: int, last: int | None) -> Merge:
        """For who was there last in that round (None: never), and so holds what it began with."""
        if last is not None and round - last > MISSED:
            last = None
        missed = rounds[0 if last is None else last - 1 : round - 1]
        if sum(nbytes(stack.values()) for stack in missed) > most:
            return Merge(weights, None, VERSION, {}, 0, 0.0)
        return Merge({}, None if last is None else VERSION, VERSION, _numbered(missed), len(missed), 0.0)

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        last = None if new else max(n for n in range(1, round) if client in at.cohorts[n - 1])
        there, held = at.length(down(way(round, last)), round, client), at.examples[client]
        ends = [at.length(up(client, n), round, client, VERSION) for n in ((1, 65535) if held is None else (held,))]
        return Span(there, there), Span(min(ends), max(ends))

    return frames


def memory(at: Sketch, forward: Pass, side: Side, optimiser: str, recompute: bool) -> Memory:
    """The peak of a side that holds the merged weights beside the net's, and the next ones while they come about."""
    weights, _ = _expected(at.trained, [])
    copies = 2 * nbytes(weights.values())
    if side == "client":
        return training(at, forward, optimiser, recompute, copies)
    return averaging(at, "plain", copies)


def _expected(trained: Tensors, rows: Sequence[int]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The base weights and each round's stack, as tensors without memory."""
    weights: dict[str, Tensor] = {}
    rounds = [{SHARES: torch.empty(count, dtype=torch.float64, device="meta")} for count in rows]
    for name, place in places(trained).items():
        left, right = trained[place.left], trained[place.right]
        whole = left.new_empty(right.shape[0], left.shape[1])
        weights[f"{name}.base_layer.weight"] = whole
        for count, stack in zip(rows, rounds, strict=True):
            pair = Pair(left.new_empty(count, left.shape[1]), left.new_empty(count, right.shape[0]))
            if nbytes(pair) < nbytes([whole]):
                stack |= {f"{name}/left": pair.left, f"{name}/right": pair.right}
            else:
                stack[f"{name}/weight"] = whole
    return weights, rounds


def _start(net: Net) -> dict[str, Tensor]:
    return {layer.weight: net.base[layer.weight] for layer in layers_of(net).values()}


def _moved(weight: Tensor, layer: Layer, pair: Pair, shares: Tensor) -> Tensor:
    matrix = weight.T if layer.turned else weight
    moved = added(matrix, pair, layer.scale * shares.double())
    return (moved.T if layer.turned else moved).contiguous()


def _check(pair: Pair, shares: Tensor, weight: Tensor, layer: Layer) -> None:
    out, taken = reversed(weight.shape) if layer.turned else weight.shape
    rows = shares.numel()
    wanted = [(rows, taken), (rows, out)]
    if shares.dim() != 1 or [tuple(t.shape) for t in pair] != wanted or not all(t.is_floating_point() for t in pair):
        raise Illegal(f"products of {[list(tensor.shape) for tensor in pair]} for {layer.weight}")


def _rounds(stacks: Tensors, count: int) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name in stacks:
        round, _, rest = name.partition("/")
        if not round.isdecimal() or int(round) >= count:
            raise Illegal(f"a product of the round {round:.20}")
        found[int(round)][rest] = stacks[name]
    return found


def _numbered(rounds: Sequence[Tensors]) -> dict[str, Tensor]:
    return {f"{i}/{name}": tensor for i, round in enumerate(rounds) for name, tensor in round.items()}
