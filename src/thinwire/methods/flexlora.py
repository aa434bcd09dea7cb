"""FlexLoRA (Bai et al., 2024), which HLoRA (2025) is too: the exact mean of products, cut back to each client's rank.

    M = sum_i p_i B_i A_i = U S V^T        client i of rank r:   B = U_r S_r,  A = V_r^T        p_i = n_i / n

Down and up: A and B of the client's own rank. M is never formed: its SVD is that of a core as large as the clients'
ranks together (see aggregate.products). The state holds the view's rank of it: what is beyond is lost, and is reported
as the share of M's energy, `lost`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics
from thinwire.aggregate.products import Pair, decomposed, joined
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, Span, fixed
from thinwire.model.net import Net
from thinwire.train.products import Ranked, cut, fresh, named, padded, pairs, rank_of, rows, shares
from thinwire.train.weights import Trained, fill, fill_checked
from thinwire.wire.legal import check_rate


@dataclass(frozen=True)
class Directions:
    """The leading directions of the mean product, as factors, the largest first; all of them or those of one rank."""

    factors: Mapping[str, Tensor]
    lr: float = 0.0


class FlexLora(Ranked):
    """Local first-order steps on factors of each client's rank; SVD of the exact mean of their products."""

    name: Literal["flexlora"] = "flexlora"

    Down, Up, State = Directions, Trained, Directions
    paper: ClassVar[str] = "Bai et al. 2024, arXiv:2402.11505"

    def init(self, server: Server) -> Directions:
        return Directions({name: server.net.base[name] for name in server.net.names})

    def broadcast(self, state: Directions, server: Server, client_id: int, held: str | None) -> Directions:
        rank = self.rank_of(client_id, rank_of(state.factors))
        return Directions(cut(state.factors, rank), self.rate(server))

    def client_update(self, down: Directions, client: Client) -> Trained:
        self.receive(down, client)
        local = self.train(client, down.lr)
        rank = self.rank_of(client.id, rank_of(client.net.base))
        factors = cut({name: p.detach() for name, p in client.net.parameters()}, rank)
        return Trained(factors, len(client.data), local.loss, local.skipped)

    def step(
        self, state: Directions, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Directions, Metrics]:
        most = rank_of(state.factors)
        part = shares(counted, [self.rank_of(reply.client, most) for reply in counted])
        # where the clients' rows are fewer than the view's, directions of no size yet: A as at the start, B 0
        spare = pairs(rows(fresh(server.net, server.key.fold("fresh"), most)))
        found, kept, whole = dict[str, Pair](), 0.0, 0.0
        for layer, pair in pairs(mean).items():
            left, right = pair.double()
            weighted = Pair(left, part[:, None] * right)
            if left.shape[0] < most:
                weighted = joined(weighted, spare[layer])
            u, values, v = decomposed(weighted)
            found[layer] = Pair(v[:most], values[:most, None] * u[:most])
            kept, whole = kept + float(values[:most].square().sum()), whole + float(values.square().sum())
        return Directions(named(found, state.factors)), {"lost": 1 - kept / whole if whole else 0.0}

    def materialise(self, state: Directions, net: Net) -> None:
        fill(net, state.factors)

    def receive(self, down: Directions, client: Client) -> None:
        check_rate(down.lr)
        fill_checked(client.net, padded(down.factors, {name: client.net.base[name] for name in client.net.names}))

    def frames(self, at: Expected) -> Frames | None:
        most = self.rank_in(at.trained)
        each = {rank: self._fixed(at, rank) for rank in {most, *self.ranks.values()}}

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            return each[self.rank_of(client, most)](round, client, new)

        return frames

    def _fixed(self, at: Expected, rank: int) -> Frames:
        factors = cut(at.trained, rank)
        return fixed(at, Directions(factors, 0.0), lambda examples: Trained(factors, examples, 0.0, 0))
