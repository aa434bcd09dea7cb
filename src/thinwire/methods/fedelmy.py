"""FedELMY (Wang et al., 2024): one pass of a relay, in which each client trains a pool of models that differ.

Clients take turns, one a round (`cohort.kind = "cyclic"`), as many rounds as clients. Client i receives m_0 and begins
its pool M with it. Then, `pool` times,

    start     m = mean(M)
    train     on  L = CE - (alpha / a) d1 + (beta / a) d2        d1 = mean_{p in M} |m - p|^2        d2 = |m - m_0|^2
    add       M <- M + {m}

with a = 10^(1 + o(d2) - o(CE)), o(x) = floor(log10 x), where that is above 1, and else 1: d2 / a stays an order below
the loss. It sends mean(M) on, and the last client's is the model. The terms' gradient is

    (2 / a) (beta (m - m_0) - alpha (m - mean(M)))

so a client holds the pool's sum and m_0, and not the pool. Down and up: the weights that are trained, all of them or
those of a view. With `received = false` m_0 is not of the pool, and the first model begins at it and not at a mean; a
pool of one without the two terms is then the plain relay. Left out of the published code: the choice of the best epoch
on rows of the client's own, and the first client's warm-up, which is for models that begin at random. With several
clients a round the server takes their mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import stepped
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, fixed
from thinwire.costs.memory import Memory, Side, averaging, training
from thinwire.costs.sketch import Pass, Sketch, Work
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder
from thinwire.train.local import Adjust
from thinwire.train.weights import Trained, check_weights, fill, fill_checked
from thinwire.wire.legal import check_rate


@dataclass(frozen=True)
class Passed:
    """The weights that are passed on, in the net's dtype; also the server's state, with the memory of its step."""

    weights: Mapping[str, Tensor]
    lr: float = 0.0
    moments: Mapping[str, Tensor] | None = None


class FedELMY(FirstOrder):
    """Each client in its turn trains a pool of models, far from each other and near what came, and sends their mean."""

    name: Literal["fedelmy"] = "fedelmy"
    moments: Literal["fresh"] = "fresh"  # each client is visited once
    pool: PositiveInt = 5  # models that a client trains, each for `steps`
    alpha: NonNegativeFloat = 1.0  # how far a new one is pushed from those of the pool
    beta: NonNegativeFloat = 1.0  # how far it is pulled back to the one that came
    received: bool = True  # the one that came is of the pool, as published: it counts in each mean

    Down, Up, State = Passed, Trained, Passed
    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2404.12130"
    keeps: ClassVar[bool] = False

    def init(self, server: Server) -> Passed:
        return Passed({name: server.net.base[name] for name in server.net.names})

    def broadcast(self, state: Passed, server: Server, client_id: int, held: str | None) -> Passed:
        return Passed(state.weights, self.rate(server))

    def client_update(self, down: Passed, client: Client) -> Trained:
        self.receive(down, client)
        parameters = dict(client.net.parameters())
        first = [p.detach().to(torch.float32, copy=True) for p in parameters.values()]
        total, size = [m.clone() if self.received else torch.zeros_like(m) for m in first], int(self.received)
        loss, skipped, taken = 0.0, 0, 0
        for turn in range(self.pool):
            if size:
                _put(parameters.values(), total, size)
            seen: list[float] = []
            hand = self._terms(first, total, size, seen) if self.alpha or self.beta else None
            here = client if turn == 0 else replace(client, key=client.key.fold("pool", turn))
            local = self.train(here, down.lr, keep=True, adjust=hand, losses=seen)
            for sum_of, weight in zip(total, local.weights, strict=True):
                sum_of += weight.detach()
            size, steps = size + 1, self.steps - local.skipped
            taken, skipped = taken + steps, skipped + local.skipped
            loss += steps * local.loss if steps else 0.0
        _put(parameters.values(), total, size)
        weights = {name: p.detach() for name, p in parameters.items()}
        return Trained(weights, len(client.data), loss / taken if taken else math.nan, skipped)

    def _terms(self, first: Sequence[Tensor], total: Sequence[Tensor], size: int, seen: Sequence[float]) -> Adjust:
        """The gradient of both terms, added to the loss's; `seen` has the step's loss at its end."""

        @torch.no_grad()
        def adjust(weights: Sequence[Tensor]) -> None:
            away = sum(float((m - m0).double().square().sum()) for m, m0 in zip(weights, first, strict=True))
            unit = 2 / scale(seen[-1], away)
            for m, m0, sum_of in zip(weights, first, total, strict=True):
                if m.grad is not None:
                    m.grad.add_(m - m0, alpha=unit * self.beta)
                    m.grad.sub_(m - (sum_of / size if size else m0), alpha=unit * self.alpha)

        return adjust

    def check(self, state: Passed, client_id: int, up: Trained) -> None:
        check_weights(state.weights, up.weights)

    def update(self, state: Passed, server: Server, up: Trained) -> Update:
        return Update(up.weights, self.weight(up), up.loss, up.skipped)

    def origin(self, state: Passed) -> Mapping[str, Tensor]:
        return state.weights

    def step(
        self, state: Passed, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Passed, Metrics]:
        weights, moments = stepped(self.server_step, state.weights, mean, state.moments)
        return Passed(weights, moments=moments), {}

    def materialise(self, state: Passed, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Passed, client: Client) -> None:
        check_rate(down.lr)
        fill_checked(client.net, down.weights)

    def work(self, round: int) -> Work:
        one = super().work(round)
        return one._replace(steps=self.pool * one.steps, rows=self.pool * one.rows)

    def frames(self, at: Expected) -> Frames | None:
        return fixed(at, Passed(at.trained, 0.0), lambda examples: Trained(at.trained, examples, 0.0, 0))

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        if side == "client":  # what came and the pool's sum, float32
            return training(at, forward, self.optimiser, self.recompute, copies=8 * at.size)
        return averaging(at, self.server_step.kind)


def scale(loss: float, distance: float) -> float:
    """a: the power of ten that brings a squared distance below the loss, a digit shorter; 1 where it is so already."""
    if distance <= 0 or loss <= 0:
        return 1.0
    return 10.0 ** max(0, math.floor(math.log10(distance)) - math.floor(math.log10(loss)) + 1)


@torch.no_grad()
def _put(parameters: Iterable[Tensor], total: Sequence[Tensor], size: int) -> None:
    """Parameters := the mean of a pool of that size and sum."""
    for parameter, sum_of in zip(parameters, total, strict=True):
        parameter.copy_(sum_of / size)
