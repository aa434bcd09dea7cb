"""FedKSeed and FedKSeed-Pro (Qin et al., 2024): full-parameter tuning in which only seeds and scalars travel.

A pool of K directions z_j is known to all from one key. The global model *is* the start model and K numbers:
w = s w0 - sum_j A_j z_j. Each local step draws j, measures g = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps) with two
forward passes and moves w by -lr g z_j; with n queries it draws n directions and moves by the mean over them.
A accumulates lr times g and not g, so that lr may change from round to round. s is the product of the steps' weight
decays, 1 without: decay is applied once a step, in training and in rebuild alike.

shared=True: all clients of a round draw the same directions, as in DeComFL (Li et al., 2024, arXiv:2405.15861): their
scalars are averaged before they move anything. sides=1: g = (L(w + eps z) - L(w)) / eps; both, and one step of many
queries, are BAFFLE (Feng et al., 2023, arXiv:2301.12195).

What travels, in the paper's form: down A (float32) and with Pro the probabilities of the K directions; up one pair
(direction, g) a step. In the thin form: down A in whole multiples of a grid fixed for the run, to a client that holds a
version only the changes; up the scalars alone, for a client's directions follow from a key that the server knows. What
rounding leaves is sent later. Pro's probabilities go as integers of four bits, and both ends draw with integers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Reports, Update
from thinwire.core import Averaged, Client, Server
from thinwire.costs.frames import Expected, Frames, simulated
from thinwire.costs.memory import Memory, Side, holding, probing
from thinwire.costs.sketch import Pass, Sketch, Work
from thinwire.model.net import Net
from thinwire.perturb import pool, probe
from thinwire.perturb.directions import Directions, PoolLaw
from thinwire.perturb.masked import SharedScalars
from thinwire.perturb.moves import Moves
from thinwire.perturb.pool import TILTS, Levels, Pool
from thinwire.perturb.scalars import as_floats, as_sent, check_picks, check_scalars, drawn
from thinwire.perturb.spsa import shrink_of, walk, work
from thinwire.privacy.protection import BOTH, Level
from thinwire.privacy.released import Released
from thinwire.privacy.secure import Secure
from thinwire.train.local import Schedule, scheduled
from thinwire.train.protected import protected_at
from thinwire.wire import Illegal, legal
from thinwire.wire.payload import LATE

BLOCK = 128  # replies that the server adds up at a time


@dataclass(frozen=True)
class Gains:
    """The global model as a client receives it.

    Paper: gains and, with Pro, probabilities, float32 [K]. Thin: levels, [K] packed integers, the gains in units of
    grid, or what changed in them since the version `base`; with Pro, tilts, [K] packed integers below 16.
    """

    pool: int
    draws: int  # of the round; with a client's id the key of the directions that it draws
    lr: float
    shrink: float
    gains: Tensor | None = None
    probabilities: Tensor | None = None
    grid: float = 0.0
    levels: bytes | None = None
    base: str | None = None
    tilts: bytes | None = None


@dataclass(frozen=True)
class Steps:
    """A client's scalars in order, steps by queries; its examples and mean loss.

    scalars: float32, float16, or int8 in units of `unit`; NaN or SKIPPED throughout a step that was skipped. seeds:
    int32, the directions, in the paper's form.
    """

    seeds: Tensor | None = field(metadata={"release": True})
    scalars: Tensor = field(metadata={"release": True})
    unit: float = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})


@dataclass(frozen=True)
class Accumulators:
    """The server's memory. gains, and the sum and the count of |g| for each direction: float64 [K].

    In the thin form the model is made of the gains' nearest multiples of grid, whose version clients may hold.
    `moments` is the memory of the server's step, which moves the gains.
    """

    pool: int
    gains: Tensor
    shrink: float
    amplitude: Tensor
    visits: Tensor
    grid: float = 0.0
    version: str | None = None
    moments: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)


class FedKSeed(Averaged):
    """Zeroth-order steps along K shared directions; kilobytes a round, whatever the model's size."""

    name: Literal["fedkseed"] = "fedkseed"
    seeds: int = Field(4096, ge=1, le=1 << 24)
    pro: bool = False
    lr: float = Field(1e-5, gt=0, le=100)
    schedule: Schedule = "constant"
    eps: float = Field(5e-4, gt=0, le=100)
    law: PoolLaw = "sign"  # of the directions; gaussian is the paper's, tied is rebuilt in one pass
    rank: int = Field(1, ge=1, le=1024)  # of a matrix's direction, with law = "lowrank"
    queries: PositiveInt = 1  # directions a step
    sides: Literal[1, 2] = 2  # of a direction that are measured; 1: and the loss where they begin, once a step
    shared: bool = False  # all clients of a round draw the same directions
    together: bool = False  # all sides of a step's probes in one forward pass: faster on small batches, more memory
    weight_decay: NonNegativeFloat = 0.0
    steps: PositiveInt = 200
    batch_size: PositiveInt = 1
    wire: Literal["thin", "paper"] = "thin"
    scalars: Literal["float32", "float16", "int8"] = "float16"  # on the thin wire; the paper's is float32
    amplitude_clip: PositiveFloat = 1000.0  # Pro: bounds |g| in the statistic alone, not in the update

    Down, Up, State = Gains, Steps, Accumulators
    paper: ClassVar[str] = "Qin et al. 2024, arXiv:2312.06353"
    private, leaves_last = BOTH, True

    @model_validator(mode="after")
    def _combined(self) -> FedKSeed:
        kinds, draws = self.aggregation.kinds, self.steps * self.queries
        if self.pro and kinds != ("mean",):
            raise ValueError("pro: its probabilities are of plain sums of what clients send: aggregation mean alone")
        if {"median", "trimmed"} & {*kinds} and not self.shared and draws < self.seeds:
            raise ValueError(f"aggregation: {draws} draws of {self.seeds} seeds have none in common; set shared = true")
        return self

    def init(self, server: Server) -> Accumulators:
        key, zeros = server.key.fold("directions").word(), torch.zeros(self.seeds, dtype=torch.float64)
        return Accumulators(key, zeros, 1.0, zeros.clone(), torch.ones_like(zeros))  # as in the paper: one |g| of 0

    def broadcast(self, state: Accumulators, server: Server, client_id: int, held: str | None) -> Gains:
        lr = scheduled(self.schedule, self.lr, server.round, server.rounds)
        down = (state.pool, pool.draws_key(server.key), lr, state.shrink)
        amplitudes = state.amplitude / state.visits
        if self.wire == "paper":
            return Gains(*down, state.gains.float(), pool.seed_probabilities(amplitudes).float() if self.pro else None)
        known = server.versions.get(held) if held is not None else None
        levels, changes = Levels.of(state.gains, state.grid).encode(known)
        tilts = pool.packed(pool.seed_tilts(amplitudes).tobytes()) if self.pro else None
        return Gains(*down, grid=state.grid, levels=levels, base=held if changes else None, tilts=tilts)

    def client_update(self, down: Gains, client: Client) -> Steps:
        self.receive(down, client)
        known = self._pool(down.pool)
        sent = down.probabilities if self.wire == "paper" else down.tilts
        shares = pool.shares_sent(sent, self.seeds) if self.pro else None
        picks = known.picks(down.draws, [0 if self.shared else client.id], (self.steps, self.queries), shares)[0]
        scalars, loss = walk(
            client.net,
            known.directions,
            picks,
            client.data.batches(client.key.fold("batches"), self.batch_size),
            lr=down.lr,
            eps=self.eps,
            shrink=shrink_of(down.lr, self.weight_decay),
            together=self.together,
            # What travels is applied, so that a rebuild repeats the training; int8 alone is rounded at the end, when
            # its unit is known. Nobody would see the last move: the server makes it from the scalars.
            applied=lambda found: found.astype(np.float16) if self._form == "float16" else found,
            last=False,
            sides=self.sides,
            protected=protected_at(client, self.batch_size),
        )
        seeds = torch.from_numpy(picks.ravel().astype(np.int32)) if self.wire == "paper" else None
        return Steps(seeds, *as_sent(scalars.ravel(), self._form), len(client.data), loss)

    def check(self, state: Accumulators, client_id: int, up: Steps) -> None:
        if (up.seeds is None) == (self.wire == "paper"):
            raise Illegal("seeds travel in the paper's form, and in no other")
        check_picks(up.seeds, self.steps * self.queries, self.seeds)
        check_scalars(up.scalars, up.unit, self._form, (self.steps, self.queries))

    def aggregate(
        self, state: Accumulators, server: Server, replies: Iterable[tuple[int, Steps]]
    ) -> tuple[Accumulators, Metrics]:
        if server.protection or self.aggregation.kind != "mean":  # each vector is needed; a mean adds many in one go
            return super().aggregate(state, server, replies)
        moves, reports, block = Moves(state.amplitude, state.visits, self.amplitude_clip), Reports(), list[Any]()
        for client_id, up, weight in self.weighed(server, replies):
            reports.add(Update({}, weight, up.loss))
            one = client_id, weight, (up.scalars, up.unit), up.seeds  # no reply is held itself
            if client_id in server.late:  # along the directions and at the rate of an earlier round
                self._add(moves, *server.asked(client_id, state), [one])
            else:
                block.append(one)
            if len(block) == BLOCK:
                self._add(moves, state, server, block)
                block = []
        if block:
            self._add(moves, state, server, block)
        if moves.weight == 0:
            return state, {}
        state, own = self._moved(state, server, moves.average())
        return state, reports.metrics | {"skipped": moves.skipped} | own

    def update_of(self, state: Accumulators, server: Server, client_id: int, up: Steps) -> Update:
        moves = Moves(state.amplitude, state.visits, self.amplitude_clip)
        self._add(moves, state, server, [(client_id, 1.0, (up.scalars, up.unit), up.seeds)])
        return Update({"gains": moves.tensor}, self.weight(up), up.loss, moves.skipped, moves.metrics)

    def linear(self, secure: Secure) -> SharedScalars:
        return SharedScalars(self, secure, self._form)

    def step(
        self, state: Accumulators, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Accumulators, Metrics]:
        moves = Moves(state.amplitude, state.visits, self.amplitude_clip).take(mean["gains"], counted)
        return self._moved(state, server, moves)

    def _add(self, moves: Moves, state: Accumulators, server: Server, block: Sequence[Any]) -> None:
        """All replies of a block in one go, in their order: one by one they would cost far more."""
        clients, weights, sent, seeds = zip(*block, strict=True)
        scalars = as_floats(sent, self._form, shape := (self.steps, self.queries))
        if self.wire == "paper":
            picks = torch.stack(seeds).numpy().reshape(scalars.shape)
        else:
            tilts = TILTS[pool.seed_tilts(state.amplitude / state.visits)] if self.pro else None
            streams = [0] * len(clients) if self.shared else clients
            picks = self._pool(state.pool).picks(pool.draws_key(server.key), streams, shape, tilts)
        lr = scheduled(self.schedule, self.lr, server.round, server.rounds)
        moves.add(picks, scalars, np.array(weights, np.float64), lr / self.queries, shrink_of(lr, self.weight_decay))

    def _moved(self, state: Accumulators, server: Server, moves: Moves) -> tuple[Accumulators, Metrics]:
        """The state under moves and a shrink that are those of the mean."""
        gains, moments = moves.gains, state.moments
        if not self.server_step.plain:
            move, moments = self.server_step(state.moments or {}, "gains", torch.from_numpy(gains))
            gains = move.numpy()
        gains = moves.shrink * state.gains.numpy() + gains
        touched = gains[gains != 0]
        grid = pool.grid_of(touched, state.grid, np.array(moves.lengths).T if moves.lengths else None)
        sums, sizes, counts = (torch.from_numpy(array) for array in (gains, moves.amplitude, moves.visits))
        version = server.versions.put(Levels.of(sums, grid).table()) if self.wire == "thin" else None
        state = Accumulators(state.pool, sums, state.shrink * moves.shrink, sizes, counts, grid, version, moments)
        return state, {"directions": int(touched.size)}

    def materialise(self, state: Accumulators, net: Net) -> None:
        gains, grid = state.gains, state.grid
        gains = gains if self.wire == "paper" else torch.from_numpy(Levels.of(gains, grid).values * grid)
        self._pool(state.pool).rebuild(net, gains.float(), state.shrink)

    def reply_bytes(self, net: Net) -> int:
        return 8 * self.steps * self.queries  # a scalar and a seed of four bytes each

    def receive(self, down: Gains, client: Client) -> None:
        legal.check_rate(down.lr)
        legal.check_keys(down.pool, down.draws)
        thin, sent = self.wire == "thin", (down.levels, down.base, down.grid)
        gains = pool.received(client, *sent, self.seeds) if thin else pool.plain(down.gains, self.seeds)
        if not (gains.abs() <= legal.LARGEST).all() or not abs(down.shrink) <= 1:
            raise Illegal("gains or shrink are beyond their bounds, or not finite")
        self._pool(down.pool).rebuild(client.net, gains, down.shrink)

    @property
    def additive(self) -> bool:
        return not {"median", "trimmed"} & {*self.aggregation.kinds}  # of each direction apart: a round has its own

    @property
    def _form(self) -> str:
        return "float32" if self.wire == "paper" else self.scalars

    def _pool(self, key: int) -> Pool:
        return Pool(Directions(key, self.law, self.rank, self.seeds), self.seeds)

    def released(self, level: Level) -> Released | None:
        return None if self.pro or self.sides == 1 or self.weight_decay else super().released(level)

    def fits(self, net: Net) -> None:
        probe.check(net, self._pool(0).directions, self.together, self.name)

    def work(self, round: int) -> Work:
        return work(self.steps, self.queries, self.batch_size, self.together, self.sides)

    def frames(self, at: Expected) -> Frames | None:
        count, thin = self.steps * self.queries, self.wire == "thin"
        seeds = None if thin else torch.zeros(count, dtype=torch.int32)

        def reply(generator: np.random.Generator, examples: int) -> Steps:
            return Steps(seeds, drawn(generator, count, self._form), 1.0, examples, 0.0)

        return simulated(self, at, reply, (lambda state: Levels.of(state.gains, state.grid).table()) if thin else None)

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        # Net.rebuild keeps a copy for the next visit
        return probing(at, forward, self.law, at.trained_bytes) if side == "client" else holding(at, at.trained_bytes)
