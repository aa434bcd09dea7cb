"""Weights that products of factors are merged into, round by round: every peer holds the same bits of them.

    W <- W + scale sum_j c_j b_j a_j^T          of each layer; a_j, b_j: rows of all clients' factors, c_j their shares

in float64, rounded once, to W's dtype; in the order of j, so that a sum is the same on any CPU. What travels are the
rows and shares of the rounds that a peer has missed, of a layer the weights where these are shorter; who has missed
more than is as long as all these weights receives the weights. The start is nobody sent: all have the start model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from thinwire.aggregate.products import Pair, added
from thinwire.core import Client, StaleVersion, Versions
from thinwire.costs.frames import VERSION, Expected, Frames, Span
from thinwire.costs.memory import Memory, Side, averaging, training
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train.products import places
from thinwire.wire import Illegal

Tensors = Mapping[str, Tensor]
SHARES = "shares"
MISSED = 7  # rounds that a peer may be behind: of its own versions it keeps eight


class Layer(NamedTuple):
    """Where products are merged into: the weight's name, the factors' scale, whether the weight lies turned over."""

    weight: str
    scale: float
    turned: bool


class History(NamedTuple):
    """The weights as they are, their version, the start's, and how they came of the versions before.

    `stacks`: what each of the last rounds has added, under ROUND/LAYER/left, /right (or /weight, as it then was) and
    ROUND/shares; `bases`: the version that each began from, oldest first.
    """

    weights: Tensors
    version: str
    start: str
    stacks: Tensors
    bases: list[str]


@dataclass(frozen=True)
class Merged:
    """The state of a method with such a base: the factors beside it, and its history."""

    factors: Tensors
    weights: Tensors
    version: str
    start: str
    stacks: Tensors
    bases: list[str]

    @property
    def history(self) -> History:
        """Of the base weights."""
        return History(self.weights, self.version, self.start, self.stacks, self.bases)


class Way(NamedTuple):
    """How to come from the version `base`, None: the start, to a version; or all the `weights`."""

    weights: Tensors
    base: str | None
    stacks: Tensors
    rounds: int


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


def begun(net: Net, versions: Versions) -> History:
    """The start."""
    weights = _start(net)
    version = versions.put(weights)
    return History(weights, version, version, {}, [])


def merged(history: History, net: Net, versions: Versions, products: Mapping[str, Pair], shares: Tensor) -> History:
    """The history with one round more: each layer's rows of `products`, and how much each counts."""
    after, stack = dict(history.weights), {SHARES: shares.double()}
    for name, layer in layers_of(net).items():
        pair, old = products[name], history.weights[layer.weight]
        after[layer.weight] = _moved(old, layer, pair, shares)
        if nbytes(pair) < nbytes([old]):
            stack |= {f"{name}/left": pair.left, f"{name}/right": pair.right}
        else:
            stack[f"{name}/weight"] = after[layer.weight]
    version = versions.put(after)
    if version == history.version:
        return history
    rounds = [*_rounds(history.stacks, len(history.bases)), stack]
    bases = [*history.bases, history.version]
    most = nbytes(after.values())
    while sum(nbytes(round.values()) for round in rounds) > most:
        rounds, bases = rounds[1:], bases[1:]
    return History(after, version, history.start, _numbered(rounds), bases)


def way(history: History, held: str | None) -> Way:
    """What a peer is sent that holds this version, None: the start; the shorter of the rounds missed and of all."""
    if held is not None and held != history.version and held not in history.bases[-MISSED:]:
        held = None  # as one who is new
    known = held or history.start
    if known == history.version:
        return Way({}, held, {}, 0)
    if known in history.bases:
        rounds = _rounds(history.stacks, len(history.bases))[history.bases.index(known) :]
        return Way({}, held, _numbered(rounds), len(rounds))
    return Way(history.weights, None, {}, 0)


def follow(way: Way, version: str, client: Client) -> None:
    """Bring the client's net to that version, and keep it. StaleVersion: its base is not held; Illegal: no such way."""
    layers = layers_of(client.net)
    weights = dict(way.weights)
    if not weights:
        held: Tensors | None = _start(client.net) if way.base is None else client.versions.get(way.base)
        if held is None or set(held) != {layer.weight for layer in layers.values()}:
            raise StaleVersion
        weights = dict(held)
    if not 0 <= way.rounds <= (0 if way.weights else len(way.stacks)):
        raise Illegal(f"{way.rounds} rounds of {len(way.stacks)} tensors")
    for stack in _rounds(way.stacks, way.rounds):
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
    if client.versions.put(weights) != version:
        raise Illegal(f"the products do not make the version {version:.12}")
    client.held = version


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


def expected(at: Expected, rows: Sequence[int], down: Callable[[Way], Any], up: Callable[[int, int], Any]) -> Frames:
    """The frames before a run where all reply and each round moves the weights: as long as they will be, to the byte.

    `rows`: how many each round's stacks have; `down` makes the broadcast that holds a way, `up` the reply of a client
    with so many examples.
    """
    weights, rounds = _expected(at.trained, rows)
    most = nbytes(weights.values())

    def way(round: int, last: int | None) -> Way:
        """For who was there last in that round (None: never), and so holds what it began with."""
        if last is not None and round - last > MISSED:
            last = None
        missed = rounds[0 if last is None else last - 1 : round - 1]
        if sum(nbytes(stack.values()) for stack in missed) > most:
            return Way(weights, None, {}, 0)
        return Way({}, None if last is None else VERSION, _numbered(missed), len(missed))

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
