"""FedEx-LoRA (Singhal et al., 2024): the mean of the factors goes on, and what it lacks goes into the base weights.

    A = sum_i p_i A_i        B = sum_i p_i B_i        W <- W + s (sum_i p_i B_i A_i - B A)        p_i = n_i / n

so that after a round W + s B A is the exact mean of the clients' models. Down: A and B, and of each round that a
client has missed the rows that W's change is made of: all clients' factors and the means, or of a layer W itself, what
is shorter (see train.merged). A newcomer who has missed more than W is long receives W. Up: A_i and B_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.products import Pair, weighed
from thinwire.core import Client, Server
from thinwire.costs.frames import VERSION, Expected, Frames
from thinwire.costs.memory import Memory, Side
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.net import Net
from thinwire.train.local import scheduled
from thinwire.train.merged import Merged, Way, begun, check_merges, expected, fill_merged, follow, memory, merged, way
from thinwire.train.products import OnProducts, check_factors, named, pairs, rank_of, rows, shares
from thinwire.train.weights import Trained, fill, fill_checked
from thinwire.wire.legal import check_rate


@dataclass(frozen=True)
class Exact:
    """The factors, and how to come from the base weights `base` to `version`: see merged.Way."""

    factors: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    base: str | None
    version: str
    stacks: Mapping[str, Tensor]
    rounds: int
    lr: float


class FedEx(OnProducts):
    """Local first-order steps on both factors; their mean, and in the base weights what the mean lacks."""

    name: Literal["fedex"] = "fedex"

    Down, Up, State = Exact, Trained, Merged
    paper: ClassVar[str] = "Singhal et al. 2024, arXiv:2410.09432"

    def init(self, server: Server) -> Merged:
        return Merged({n: server.net.base[n] for n in server.net.names}, *begun(server.net, server.versions))

    def broadcast(self, state: Merged, server: Server, client_id: int, held: str | None) -> Exact:
        weights, base, stacks, count = way(state.history, held)
        lr = scheduled(self.schedule, self.lr, server.round, server.rounds)
        return Exact(state.factors, weights, base, state.version, stacks, count, lr)

    def client_update(self, down: Exact, client: Client) -> Trained:
        self.receive(down, client)
        local = self.train(client, down.lr)
        factors = {name: p.detach() for name, p in client.net.parameters()}
        return Trained(factors, len(client.data), local.loss, local.skipped)

    def check(self, state: Merged, client_id: int, up: Trained) -> None:
        check_factors(state.factors, up.weights)

    def update(self, state: Merged, server: Server, up: Trained) -> Update:
        return Update(rows(up.weights), self.weight(up), up.loss, up.skipped)

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
        return Merged(factors, *merged(state.history, server.net, server.versions, lacking, part)), {}

    def materialise(self, state: Merged, net: Net) -> None:
        fill_merged(net, state.weights)
        fill(net, state.factors)

    def receive(self, down: Exact, client: Client) -> None:
        check_rate(down.lr)
        follow(Way(down.weights, down.base, down.stacks, down.rounds), down.version, client)
        fill_checked(client.net, down.factors)

    def fits(self, net: Net) -> None:
        super().fits(net)
        check_merges(net)

    @property
    def moves_base(self) -> bool:
        return True

    def frames(self, at: Expected) -> Frames | None:
        return expected(
            at,
            [(len(cohort) + 1) * rank_of(at.trained) for cohort in at.cohorts],
            lambda way: Exact(at.trained, way.weights, way.base, VERSION, way.stacks, way.rounds, 0.0),
            lambda client, examples: Trained(at.trained, examples, 0.0, 0),
        )

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        return memory(at, forward, side, self.optimiser, self.recompute)
