"""What the server of a round reads in one reply, of which it knows the method, the round's key and the state before."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinwire.aggregate import columns
from thinwire.aggregate.mean import Counted, Update
from thinwire.aggregate.noised import noised_mean
from thinwire.core import Averaged, Method, Server
from thinwire.model.net import Net
from thinwire.versions import Trial

Change = dict[str, Tensor]


class Seen(NamedTuple):
    """What a reply changes, in the numbers that the server takes the mean of or else in weights; what it reports."""

    change: Change
    reports: Counted


class Reading:
    """A round's server before any reply. `net` is a workspace: all that is asked here writes to it."""

    def __init__(self, method: Method, net: Net, state: Any, server: Server) -> None:
        self.method, self.net, self.state = method, net, state
        self.server = replace(server, versions=Trial(server.versions), protection=None)
        self.protection, self.clients, self.secrets = server.protection, len(server.cohort), server.secrets

    def seen(self, client: int, up: Any) -> Seen:
        """A reply as the server has it."""
        if not isinstance(self.method, Averaged):
            return Seen(self._difference(self._alone(client, up)), Counted(client, 1.0, {}))
        update, origin = self.method.update_of(self.state, self.server, client, up), self.method.origin(self.state)
        change = {name: columns.change(update.tensors, origin, name) for name in update.tensors}
        return Seen(change, Counted(client, 1.0, update.metrics))

    def outside(self, seen: Seen) -> Seen:
        """The same as everybody but the server sees it, who knows all other clients' replies: shortened and noised."""
        assert self.protection is not None
        mean = noised_mean([(0, Update(seen.change, 1.0))], {}, self.protection, self.clients, self.secrets)
        change = {name: tensor * self.clients for name, tensor in mean.items()}
        return Seen(change, seen.reports._replace(metrics={}))

    def weights(self, seen: Seen) -> Change:
        """What a change is in the weights, float32 by name."""
        known, change = dict(self.net.parameters()), seen.change
        if not isinstance(self.method, Averaged):
            return change
        if all(name in known and change[name].shape == known[name].shape for name in change):
            return {name: change[name].float() if name in change else torch.zeros(p.shape) for name, p in known.items()}
        if [tensor.numel() for tensor in change.values()] == [self.net.size]:
            (numbers,) = change.values()
            parts = numbers.flatten().float().split([p.numel() for p in known.values()])
            return {name: part.view(p.shape) for (name, p), part in zip(known.items(), parts, strict=True)}
        origin, mean = self.method.origin(self.state), dict(change)
        for name in origin.keys() & mean.keys():
            mean[name] = mean[name] + columns.wide(origin[name])
        return self._difference(self._unrounded.step(self.state, self.server, mean, [seen.reports])[0])

    def before(self) -> Change:
        """The weights that the round begins with, float32 by name."""
        return weights_of(self._unrounded, self.state, self.net)

    @property
    def _unrounded(self) -> Any:
        """The method with a server that materialises what it knows, where that is more than it sends down."""
        thin = getattr(self.method, "wire", None) == "thin"
        return self.method.model_copy(update={"wire": "paper"}) if thin else self.method

    def _alone(self, client: int, up: Any) -> Any:
        """The state where this is the round's only reply."""
        alone = replace(self.server, cohort=(client,))
        return self.method.aggregate(copy.deepcopy(self.state), alone, iter([(client, up)]))[0]

    def _difference(self, state: Any) -> Change:
        before = self.before()
        after = weights_of(self._unrounded, state, self.net)
        return {name: after[name] - before[name] for name in after}


def weights_of(method: Method, state: Any, net: Net) -> Change:
    """The shared weights of a state: float32 copies on the CPU by name."""
    method.materialise(state, net)
    return held(net)


def held(net: Net) -> Change:
    """The shared weights in a net: float32 copies on the CPU by name."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in net.parameters()}


@torch.no_grad()
def put(net: Net, weights: Mapping[str, Tensor], move: Mapping[str, Tensor], factor: float) -> None:
    """Weights := weights + factor times a move."""
    for name, parameter in net.parameters():
        parameter.copy_(torch.add(weights[name], move[name], alpha=factor))


def product(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Iterable[str] | None = None) -> float:
    """The inner product of all tensors together."""
    return sum(float(a[name].flatten().double() @ b[name].flatten().double()) for name in names or a)


def length(a: Mapping[str, Tensor]) -> float:
    """The length of all tensors together."""
    return math.sqrt(product(a, a))


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The cosine of two changes; 0 where one is none."""
    both = length(a) * length(b)
    return product(a, b) / both if both else 0.0


def error(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> float:
    """The length of what is wrong in a change over that of the true one; 1 for who guesses none."""
    wrong = {name: found[name] - true[name] for name in true}
    return length(wrong) / length(true) if length(true) else float("nan")
