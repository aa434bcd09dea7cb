"""FedZO (Fang et al., 2022): local zeroth-order steps, then the weighted mean of the clients' weights.

Down: the global weights. Up: the client's weights after steps w := w - lr mean_q g_q z_q, with the g_q from two forward
passes each. Memory as for inference, bytes as for FedAvg: the reference that shows what FedKSeed's wire saves. With the
same pool of directions (`seeds`) both make the same weights, up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from thinwire.aggregate.linear import Changes
from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import stepped
from thinwire.core import Averaged, Client, Server
from thinwire.costs.frames import Expected, Frames, fixed
from thinwire.costs.memory import Memory, Side, averaging, probing
from thinwire.costs.sketch import Pass, Sketch, Work
from thinwire.model.net import Net
from thinwire.perturb import probe
from thinwire.perturb.directions import Directions, Law
from thinwire.perturb.pool import Pool
from thinwire.perturb.spsa import shrink_of, walk, work
from thinwire.privacy.protection import BOTH
from thinwire.privacy.secure import Secure
from thinwire.train.local import Schedule, scheduled
from thinwire.train.protected import protected_at
from thinwire.train.weights import Trained, check_weights, fill, fill_checked
from thinwire.wire.legal import check_keys, check_rate
from thinwire.wire.payload import LATE


@dataclass(frozen=True)
class Start:
    """The global weights, the key of the directions, that of the clients' draws among them in this round, the rate.

    Also the server's state, without draws and rate, and with the memory of its step.
    """

    weights: Mapping[str, Tensor]
    pool: int
    draws: int = 0
    lr: float = 0.0
    moments: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)


class FedZO(Averaged):
    """Zeroth-order local steps; whole weights travel both ways."""

    name: Literal["fedzo"] = "fedzo"
    seeds: int = Field(1 << 32, ge=1, le=1 << 32)  # directions to draw from; by default practically always fresh ones
    lr: float = Field(1e-5, gt=0, le=100)
    schedule: Schedule = "constant"
    eps: float = Field(5e-4, gt=0, le=100)
    law: Law = "gaussian"
    rank: int = Field(1, ge=1, le=1024)
    queries: PositiveInt = 1
    together: bool = False
    weight_decay: NonNegativeFloat = 0.0
    steps: PositiveInt = 200
    batch_size: PositiveInt = 1

    Down, Up, State = Start, Trained, Start
    paper: ClassVar[str] = "Fang et al. 2022, arXiv:2201.09531"
    private = BOTH

    def init(self, server: Server) -> Start:
        return Start({name: server.net.base[name] for name in server.net.names}, server.key.fold("directions").word())

    def broadcast(self, state: Start, server: Server, client_id: int, held: str | None) -> Start:
        lr = scheduled(self.schedule, self.lr, server.round, server.rounds)
        return Start(state.weights, state.pool, server.key.fold("draws").word(), lr)

    def client_update(self, down: Start, client: Client) -> Trained:
        self.receive(down, client)
        pool = Pool(Directions(down.pool, self.law, self.rank), self.seeds)
        scalars, loss = walk(
            client.net,
            pool.directions,
            pool.picks(down.draws, [client.id], (self.steps, self.queries))[0],
            client.data.batches(client.key.fold("batches"), self.batch_size),
            lr=down.lr,
            eps=self.eps,
            shrink=shrink_of(down.lr, self.weight_decay),
            together=self.together,
            protected=protected_at(client, self.batch_size),
        )
        weights = {name: p.detach() for name, p in client.net.parameters()}
        return Trained(weights, len(client.data), loss, int(np.isnan(scalars).any(axis=1).sum()))

    def check(self, state: Start, client_id: int, up: Trained) -> None:
        check_weights(state.weights, up.weights)

    def update(self, state: Start, server: Server, up: Trained) -> Update:
        return Update(up.weights, self.weight(up), up.loss, up.skipped)

    def origin(self, state: Start) -> Mapping[str, Tensor]:
        return state.weights

    def linear(self, secure: Secure) -> Changes:
        return Changes(self, secure)

    def step(
        self, state: Start, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Start, Metrics]:
        weights, moments = stepped(self.server_step, state.weights, mean, state.moments)
        return Start(weights, state.pool, moments=moments), {}

    def materialise(self, state: Start, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Start, client: Client) -> None:
        check_rate(down.lr)
        check_keys(down.pool, down.draws)
        fill_checked(client.net, down.weights)

    def fits(self, net: Net) -> None:
        probe.check(net, Directions(0, self.law, self.rank), self.together, self.name)

    def work(self, round: int) -> Work:
        return work(self.steps, self.queries, self.batch_size, self.together)

    def frames(self, at: Expected) -> Frames | None:
        down = Start(at.trained, 1 << 63, 1 << 63, 0.0)
        return fixed(at, down, lambda examples: Trained(at.trained, examples, 0.0, 0))

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        if side == "client":
            return probing(at, forward, self.law)
        return averaging(at, self.server_step.kind)
