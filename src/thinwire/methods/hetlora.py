"""HetLoRA (Cho et al., 2024): factors of each client's rank, which a client may lower; means weighed by their size.

    down      the first r_i rows of A and columns of B
    local     loss + lam |B[:, g r_i:]| |A[g r_i:]|, summed over layers; where this product ends below where it began,
              r_i <- g r_i: the rows and columns beyond are cut                             g: `keep`, lam: `penalty`
    server    A = sum_i q_i pad(A_i), B = sum_i q_i pad(B_i)           q_i = |B_i A_i| / sum_j |B_j A_j| in each layer

Down and up: A and B of the client's rank. It is the mean of factors, as FedIT's, and not of products; `weighting`
weighs the reported losses alone. A rank of 1 is not lowered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.products import Pair, norm
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, Span, fixed
from thinwire.model.net import Net
from thinwire.train.local import Local
from thinwire.train.products import Ranked, check_factors, cut, named, padded, pairs, places, rank_of, rows
from thinwire.train.weights import Trained, fill, fill_checked
from thinwire.wire import Illegal
from thinwire.wire.legal import check_rate

RANK = "rank"  # in a client's memory: what it has lowered its own to


@dataclass(frozen=True)
class Padded:
    """The factors at the view's rank, or of a client's; in the state the ranks that clients have come to."""

    factors: Mapping[str, Tensor]
    clients: list[int]
    ranks: list[int]
    lr: float = 0.0


class HetLora(Ranked):
    """Local first-order steps on factors of each client's rank; zero padding, and a mean weighed by the products."""

    name: Literal["hetlora"] = "hetlora"
    keep: float = Field(0.99, gt=0, le=1)  # gamma: what of a rank is left where a client lowers it; 1: never
    penalty: NonNegativeFloat = 1e-3  # lambda, on the size of what would be cut

    Down, Up, State = Padded, Trained, Padded
    paper: ClassVar[str] = "Cho et al. 2024, arXiv:2401.06432"

    def init(self, server: Server) -> Padded:
        return Padded({name: server.net.base[name] for name in server.net.names}, [], [])

    def broadcast(self, state: Padded, server: Server, client_id: int, held: str | None) -> Padded:
        return Padded(cut(state.factors, self._now(state, client_id)), [], [], self.rate(server))

    def client_update(self, down: Padded, client: Client) -> Trained:
        self.receive(down, client)
        rank = min(rank_of(down.factors), self.rank_of(client.id, rank_of(client.net.base)))
        if RANK in client.memory:
            rank = min(rank, int(client.memory[RANK]))
        fill(client.net, padded(cut(down.factors, rank), _start(client.net)))
        fewer = self._lower(rank)
        before = _tail(client.net, fewer)
        local = self._train(client, down.lr, fewer)
        if fewer < rank and _tail(client.net, fewer) < before:
            rank = fewer
        client.memory[RANK] = torch.tensor(rank)
        factors = cut({name: p.detach() for name, p in client.net.parameters()}, rank)
        return Trained(factors, len(client.data), local.loss, local.skipped)

    def check(self, state: Padded, client_id: int, up: Trained) -> None:
        if set(up.weights) != set(state.factors):
            raise Illegal("the names of the factors are not the model's")
        left, most = next(up.weights[place.left] for place in places(up.weights).values()), self._now(state, client_id)
        rank = left.shape[0] if left.dim() else 0
        if not 0 < rank <= most:
            raise Illegal(f"factors of rank {rank}, of {most} at most")
        check_factors(cut(state.factors, rank), up.weights)

    def update(self, state: Padded, server: Server, up: Trained) -> Update:
        rank = rank_of(up.weights)
        return Update(rows(up.weights), self.weight(up), up.loss, up.skipped, {"rank": rank})

    def step(
        self, state: Padded, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Padded, Metrics]:
        most, each = rank_of(state.factors), [int(reply.metrics["rank"]) for reply in counted]
        found: dict[str, Pair] = {}
        for layer, stack in pairs(mean).items():
            own = [Pair(*sides) for sides in zip(*(side.double().split(each) for side in stack), strict=True)]
            sizes = [norm(pair) for pair in own]
            total = sum(sizes)
            # where no product has a size yet, all count the same
            parts = [size / total if total else 1 / len(own) for size in sizes]
            sums = Pair(*(torch.zeros(most, side.shape[1], dtype=torch.float64) for side in stack))
            for part, pair in zip(parts, own, strict=True):
                for whole, side in zip(sums, pair, strict=True):
                    whole[: side.shape[0]] += part * side
            found[layer] = sums
        ranks = dict(zip(state.clients, state.ranks, strict=True))
        ranks |= {reply.client: rank for reply, rank in zip(counted, each, strict=True)}
        clients = sorted(ranks)
        metrics = {"rank": sum(each) / len(each)}
        return Padded(named(found, state.factors), clients, [ranks[client] for client in clients]), metrics

    def materialise(self, state: Padded, net: Net) -> None:
        fill(net, state.factors)

    def receive(self, down: Padded, client: Client) -> None:
        check_rate(down.lr)
        fill_checked(client.net, padded(down.factors, _start(client.net)))

    def frames(self, at: Expected) -> Frames | None:
        """From where every visit has lowered the rank to where none has; a round's first frames are exact."""
        most = self.rank_in(at.trained)
        of = {client: self.rank_of(client, most) for cohort in at.cohorts for client in cohort}
        sizes: dict[int, Frames] = {}

        def fixed_of(rank: int) -> Frames:
            if rank not in sizes:
                factors = cut(at.trained, rank)
                down = Padded(factors, [], [])
                sizes[rank] = fixed(at, down, lambda examples: Trained(factors, examples, 0.0, 0))
            return sizes[rank]

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            there = low = of[client]
            for _ in range(sum(client in cohort for cohort in at.cohorts[: round - 1])):
                low = self._lower(low)
            down = [fixed_of(rank)(round, client, new)[0] for rank in (low, there)]
            up = [fixed_of(rank)(round, client, new)[1] for rank in (self._lower(low), there)]
            return Span(down[0].least, down[1].most), Span(up[0].least, up[1].most)

        return frames

    def _now(self, state: Padded, client: int) -> int:
        """The rank that a client has come to, as far as is known here."""
        known = dict(zip(state.clients, state.ranks, strict=True))
        return known.get(client, self.rank_of(client, rank_of(state.factors)))

    def _lower(self, rank: int) -> int:
        """The rank after one pruning."""
        return max(1, math.floor(self.keep * rank)) if self.keep < 1 else rank

    def _train(self, client: Client, lr: float, fewer: int) -> Local:
        """Local steps with the penalty on the size of what is beyond `fewer`."""
        names = list(client.net.names)

        def adjust(weights: Sequence[Tensor]) -> None:
            of = dict(zip(names, weights, strict=True))
            for place in places(names).values():
                left, right = of[place.left], of[place.right]
                low, high = left.detach()[fewer:], right.detach()[:, fewer:]
                sizes = low.norm(), high.norm()
                # d |B| |A| / dA = |B| A / |A|; where one is 0 so is the product, and no direction is the better
                if left.grad is not None and sizes[0] > 0:
                    left.grad[fewer:] += self.penalty * sizes[1] / sizes[0] * low
                if right.grad is not None and sizes[1] > 0:
                    right.grad[:, fewer:] += self.penalty * sizes[0] / sizes[1] * high

        return self.train(client, lr, adjust=adjust if self.penalty else None)


def _start(net: Net) -> dict[str, Tensor]:
    return {name: net.base[name] for name in net.names}


def _tail(net: Net, fewer: int) -> float:
    """The sum over the layers of |B[:, fewer:]| |A[fewer:]|."""
    found = 0.0
    for place in net.adapted().values():
        left, right = net.parameter(place.left).detach()[fewer:], net.parameter(place.right).detach()[:, fewer:]
        found += float(left.float().norm()) * float(right.float().norm())
    return found
