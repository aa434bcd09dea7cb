"""FLoRA (Wang et al., 2024): the clients' factors, stacked, are merged into the base weights; all begin anew.

    W <- W + s sum_i p_i B_i A_i        p_i = n_i / n        then A_i fresh, B_i = 0

The stack [p_1 B_1 ... p_K B_K] [A_1; ...; A_K] is that sum and not the mean of factors, whatever the ranks. Down: of
each round that a client has missed the stack, or of a layer W itself, what is shorter (see train.merged); a newcomer
who has missed more than W is long receives W. What a client begins from it draws for itself. Up: A_i and B_i, of a
rank of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames
from thinwire.costs.memory import Memory, Side
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.net import Net
from thinwire.train.merged import Merge, Merged, begun, check_merges, expected, fill_merged, follow, memory, merged, way
from thinwire.train.products import Ranked, cut, fresh, pairs, rank_of, shares
from thinwire.train.weights import Trained, fill


class FLora(Ranked):
    """Local first-order steps on fresh factors; the exact mean of their products goes into the base weights."""

    name: Literal["flora"] = "flora"

    Down, Up, State = Merge, Trained, Merged
    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2409.05976"

    def init(self, server: Server) -> Merged:
        return begun(server)

    def broadcast(self, state: Merged, server: Server, client_id: int, held: str | None) -> Merge:
        return way(state, held, self.rate(server))

    def client_update(self, down: Merge, client: Client) -> Trained:
        self.receive(down, client)
        rank = self.rank_of(client.id, rank_of(client.net.base))
        fill(client.net, fresh(client.net, client.key.fold("fresh"), rank))
        local = self.train(client, down.lr)
        factors = cut({name: p.detach() for name, p in client.net.parameters()}, rank)
        return Trained(factors, len(client.data), local.loss, local.skipped)

    def step(
        self, state: Merged, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Merged, Metrics]:
        ranks = [self.rank_of(reply.client, rank_of(state.factors)) for reply in counted]
        return merged(state, server, pairs(mean), shares(counted, ranks)), {}

    def materialise(self, state: Merged, net: Net) -> None:
        fill_merged(net, state.weights)
        fill(net, state.factors)

    def receive(self, down: Merge, client: Client) -> None:
        follow(down, client)
        fill(client.net, client.net.base)

    def fits(self, net: Net) -> None:
        super().fits(net)
        check_merges(net)

    @property
    def moves_base(self) -> bool:
        return True

    def frames(self, at: Expected) -> Frames | None:
        most = self.rank_in(at.trained)
        return expected(
            at,
            [sum(self.rank_of(client, most) for client in cohort) for cohort in at.cohorts],
            lambda way: way,
            lambda client, examples: Trained(cut(at.trained, self.rank_of(client, most)), examples, 0.0, 0),
        )

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        return memory(at, forward, side, self.optimiser, self.recompute)
