"""FedEx-LoRA (Singhal et al., 2024): the mean of the factors goes on, and what it lacks goes into the base weights.

    A = sum_i p_i A_i        B = sum_i p_i B_i        W <- W + s (sum_i p_i B_i A_i - B A)        p_i = n_i / n

so that after a round W + s B A is the exact mean of the clients' models. Down: A and B, and of each round that a
client has missed the rows that W's change is made of: all clients' factors and the means, or of a layer W itself, what
is shorter (see train.merged). A newcomer who has missed more than W is long receives W. Up: A_i and B_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics
from thinwire.aggregate.products import Pair, weighed
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames
from thinwire.costs.memory import Memory, Side
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.net import Net
from thinwire.train.merged import Merge, Merged, begun, check_merges, expected, fill_merged, follow, memory, merged, way
from thinwire.train.products import OnProducts, named, pairs, rank_of, rows, shares
from thinwire.train.weights import Trained, fill, fill_checked


@dataclass(frozen=True)
class Factors:
    """The means of the clients' factors."""

    factors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Exact(Merge, Factors):
    """The factors first, for the last base's fields lead; and how to come to the weights below: see merged.Merge."""


class FedEx(OnProducts):
    """Local first-order steps on both factors; their mean, and in the base weights what the mean lacks."""

    name: Literal["fedex"] = "fedex"

    Down, Up, State = Exact, Trained, Merged
    paper: ClassVar[str] = "Singhal et al. 2024, arXiv:2410.09432"

    def init(self, server: Server) -> Merged:
        return begun(server)

    def broadcast(self, state: Merged, server: Server, client_id: int, held: str | None) -> Exact:
        return Exact(factors=state.factors, **vars(way(state, held, self.rate(server))))

    def client_update(self, down: Exact, client: Client) -> Trained:
        self.receive(down, client)
        local = self.train(client, down.lr)
        factors = {name: p.detach() for name, p in client.net.parameters()}
        return Trained(factors, len(client.data), local.loss, local.skipped)

    def step(
        self, state: Merged, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Merged, Metrics]:
        stacked, count = pairs(mean), len(counted)
        rank = rank_of(state.factors)
        part = shares(counted, [rank] * count)
        means = {name: Pair(*(weighed(side, part, count) for side in pair)) for name, pair in stacked.items()}
        factors = named(means, state.factors)
        own = pairs(rows(factors))  # as they travel: what their rounding loses is in the residue too
        lacking = {
            name: Pair(*(torch.cat([all_, one.to(all_)]) for all_, one in zip(pair, own[name], strict=True)))
            for name, pair in stacked.items()
        }
        part = torch.cat([part, -torch.ones(rank, dtype=torch.float64)])
        return replace(merged(state, server, lacking, part), factors=factors), {}

    def materialise(self, state: Merged, net: Net) -> None:
        fill_merged(net, state.weights)
        fill(net, state.factors)

    def receive(self, down: Exact, client: Client) -> None:
        follow(down, client)
        fill_checked(client.net, down.factors)

    def fits(self, net: Net) -> None:
        super().fits(net)
        check_merges(net)

    @property
    def moves_base(self) -> bool:
        return True

    def frames(self, at: Expected) -> Frames | None:
        rank = self.rank_in(at.trained)
        return expected(
            at,
            [(len(cohort) + 1) * rank for cohort in at.cohorts],
            lambda way: Exact(factors=at.trained, **vars(way)),
            lambda client, examples: Trained(at.trained, examples, 0.0, 0),
        )

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        return memory(at, forward, side, self.optimiser, self.recompute)
