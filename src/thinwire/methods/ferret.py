"""Ferret (Shu et al., 2024): first-order local steps, of whose update the coordinates along shared directions travel.

Each of the net's tensors is a block: tensor l has d_l numbers and a pool of K directions z_lk, which all know from one
key; their elements have mean 0 and variance 1. A round uses K_l of them, the same for all clients:

    D_i = w - w_i, after T local steps        c_ilk = z_lk . D_il        in float32, summed in float64
    A_lk <- A_lk + s(sum_i (n_i / n) c_ilk) / K_l                        w = w0 - sum_lk A_lk z_lk

In the mean over the directions that adds the clients' mean update, but with an error of |D_l| sqrt(d_l / K_l), often a
hundred times as long: so the rate of `server_step` is a step size, to be tuned with that of the local steps.

The server remembers A, so whoever comes late or has missed rounds makes the weights of all from the start model.
K_l is in proportion to |D_l|, which the coordinates show: the mean of their squares is |D_l|^2. The directions of a
round follow each other in the pool from a drawn one on.

Down: A in whole multiples of a grid, to a client that holds an earlier version only the changes, as in FedKSeed; K_l.
Up: the coordinates, float16 in units of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.core import Client, Server
from thinwire.costs.frames import Expected, Frames, simulated
from thinwire.costs.memory import Memory, Side, holding, training
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.perturb import pool
from thinwire.perturb.directions import Directions
from thinwire.perturb.pool import Levels, Pool
from thinwire.perturb.projection import project
from thinwire.train.first_order import FirstOrder
from thinwire.train.local import Optimiser
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST, check_keys, check_rate
from thinwire.wire.payload import LATE

COORDINATES, LENGTH = "coordinates", "length"


@dataclass(frozen=True)
class Sums:
    """A in levels of a grid, tensor by tensor: packed integers [L K], whole or as changes to the version `base`.

    `draws`: of the round; the key of where in the pools its directions begin. `counts`: how many each tensor has,
    packed integers [L].
    """

    pool: int
    draws: int
    lr: float
    counts: bytes
    grid: float
    levels: bytes
    base: str | None


@dataclass(frozen=True)
class Coordinates:
    """A client's coordinates in the tensors' order, float16 in units of `unit`; examples, mean loss, skipped steps."""

    coordinates: Tensor = field(metadata={"release": True})
    unit: float = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


@dataclass(frozen=True)
class Descent:
    """A, float64 [L K], and what the last round has measured of each tensor's |D|^2, float64 [L].

    The model is made of the multiples of grid nearest to A, whose version clients may hold.
    """

    pool: int
    gains: Tensor
    squares: Tensor
    grid: float = 0.0
    version: str | None = None
    moments: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)


class Ferret(FirstOrder):
    """Local first-order steps on every parameter; some thousand coordinates travel, whatever the model's size."""

    name: Literal["ferret"] = "ferret"
    lr: float = Field(1e-4, gt=0, le=100)
    optimiser: Optimiser = "sgd"
    batch_size: PositiveInt = 4
    seeds: int = Field(200, ge=1, le=1 << 16)  # directions of each tensor
    coordinates: PositiveInt = 4096  # of a round, all tensors together: each has from one to `seeds`
    law: Literal["gaussian", "sign", "lowrank"] = "sign"  # of the directions; the paper's elements are uniform
    rank: int = Field(1, ge=1, le=1024)  # of a matrix's direction, with law = "lowrank"

    Down, Up, State = Sums, Coordinates, Descent
    paper: ClassVar[str] = "Shu et al. 2024, arXiv:2409.06277"

    def init(self, server: Server) -> Descent:
        # before anything is measured, as if all numbers changed alike
        squares = torch.tensor([float(p.numel()) for _, p in server.net.parameters()], dtype=torch.float64)
        gains = torch.zeros(len(squares) * self.seeds, dtype=torch.float64)
        return Descent(server.key.fold("directions").word(), gains, squares)

    def broadcast(self, state: Descent, server: Server, client_id: int, held: str | None) -> Sums:
        known = server.versions.get(held) if held is not None else None
        levels, changes = Levels.of(state.gains, state.grid).encode(known)
        counts = pool.packed(self._counts(state).tobytes())
        draws = pool.draws_key(server.key)
        return Sums(state.pool, draws, self.rate(server), counts, state.grid, levels, held if changes else None)

    def client_update(self, down: Sums, client: Client) -> Coordinates:
        self.receive(down, client)
        names = client.net.names
        counts = pool.unpacked(down.counts, len(names), "counts")
        if not ((counts >= 1) & (counts <= self.seeds)).all() or counts.sum() != self._total(len(names)):
            raise Illegal(
                f"the counts of {len(names)} tensors are not from 1 to {self.seeds}, or not as many as agreed"
            )
        before = [p.detach().to(torch.float32, copy=True) for _, p in client.net.parameters()]
        local = self.train(client, down.lr, keep=True)
        tensors, seeds = self._drawn(down.pool, down.draws, counts)
        directions, found = self._pool(down.pool).directions, np.empty(len(seeds))
        for i, (name, start, end) in enumerate(zip(names, before, local.weights, strict=True)):
            mine = tensors == i
            found[mine] = project(directions, start.sub_(end.detach()), name, seeds[mine])
        if not np.isfinite(found).all():
            raise Illegal("the update is not finite")
        unit = float(np.abs(found).max()) or 1.0
        sent = torch.from_numpy(found / unit).to(torch.float16)
        return Coordinates(sent, unit, len(client.data), local.loss, local.skipped)

    def check(self, state: Descent, client_id: int, up: Coordinates) -> None:
        sent, count = up.coordinates, self._total(len(state.squares))
        if sent.dtype != torch.float16 or sent.shape != (count,):
            raise Illegal(f"coordinates are {sent.dtype} {list(sent.shape)}, not torch.float16 [{count}]")
        if not 0 < up.unit <= LARGEST or not (sent.abs() <= 1).all():
            raise Illegal(f"coordinates are beyond their unit, or it is beyond its bounds: {up.unit:g}")

    def update(self, state: Descent, server: Server, up: Coordinates) -> Update:
        found = up.coordinates.float() * up.unit
        return Update({COORDINATES: found}, self.weight(up), up.loss, up.skipped, {LENGTH: float(found.norm())})

    def step(
        self, state: Descent, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Descent, Metrics]:
        counts = self._counts(state)
        tensors, seeds = self._drawn(state.pool, pool.draws_key(server.key), counts)
        found, own = mean[COORDINATES].double().numpy(), np.array([each.metrics[LENGTH] for each in counted])
        squares = np.bincount(tensors, found**2) / counts
        move = torch.zeros_like(state.gains)
        move[torch.from_numpy(tensors * self.seeds + seeds)] = torch.from_numpy(found / counts[tensors])
        move, moments = self.server_step(state.moments or {}, "gains", move)
        # whatever many legal replies add up to, clients take what it makes
        gains = (state.gains + move).clamp(-LARGEST, LARGEST)
        lengths = np.stack([own, own * [each.weight for each in counted]])
        touched = gains[gains != 0].numpy()
        grid = pool.grid_of(touched, state.grid, lengths)
        version = server.versions.put(Levels.of(gains, grid).table())
        state = Descent(state.pool, gains, torch.from_numpy(squares), grid, version, moments or None)
        return state, {"directions": int(touched.size)}

    def materialise(self, state: Descent, net: Net) -> None:
        gains = torch.from_numpy(Levels.of(state.gains, state.grid).values * state.grid).float()
        self._pool(state.pool).rebuild(net, gains.view(-1, self.seeds))

    def receive(self, down: Sums, client: Client) -> None:
        check_rate(down.lr)
        check_keys(down.pool, down.draws)
        gains = pool.received(client, down.levels, down.base, down.grid, len(client.net.names) * self.seeds)
        if not (gains.abs() <= 2 * LARGEST).all():  # the bound's nearest multiple of the grid is beyond it
            raise Illegal("gains are beyond their bounds, or not finite")
        self._pool(down.pool).rebuild(client.net, gains.view(-1, self.seeds))

    def fits(self, net: Net) -> None:
        if self.coordinates < len(net.names):
            raise ModelError(
                f"method.coordinates: {self.coordinates} are fewer than the {len(net.names)} tensors that are trained"
            )

    def reply_bytes(self, net: Net) -> int:
        return 2 * self._total(len(net.names))

    def frames(self, at: Expected) -> Frames | None:
        total = self._total(len(at.trained))
        shapes: Any = SimpleNamespace(parameters=lambda: at.trained.items())

        def reply(generator: np.random.Generator, examples: int) -> Coordinates:
            sent = torch.from_numpy(generator.standard_normal(total)).to(torch.float16)
            return Coordinates(sent, 1.0, examples, 0.0, 0)

        with_shapes = replace(at, server=lambda *where: replace(at.server(*where), net=shapes))
        return simulated(self, with_shapes, reply, lambda state: Levels.of(state.gains, state.grid).table())

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        kept = at.trained_bytes  # Net.rebuild keeps a copy for the next visit
        if side == "client":
            return training(at, forward, self.optimiser, self.recompute, kept + 4 * at.size)
        return holding(at, kept)

    def _pool(self, key: int) -> Pool:
        return Pool(Directions(key, self.law, self.rank), self.seeds)

    def _total(self, tensors: int) -> int:
        return min(self.coordinates, tensors * self.seeds)

    def _counts(self, state: Descent) -> NDArray[np.int64]:
        """K_l, from 1 to `seeds`, in proportion to what was measured of the tensors' norms: int64 [L]."""
        norms = np.sqrt(state.squares.numpy())
        total, weights = self._total(norms.size), np.maximum(norms / (norms.max() or 1.0), 1e-6)
        low, high = 0.0, self.seeds / weights.min()
        for _ in range(80):
            middle = (low + high) / 2
            enough = np.clip(middle * weights, 1, self.seeds).sum() >= total
            low, high = (low, middle) if enough else (middle, high)
        shares = np.clip(low * weights, 1, self.seeds)
        counts: NDArray[np.int64] = shares.astype(np.int64)
        first = np.argsort(np.where(counts < self.seeds, counts - shares, 1.0), kind="stable")
        counts[first[: total - int(counts.sum())]] += 1
        return counts

    def _drawn(self, key: int, draws: int, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each coordinate of a round: its tensor, and its direction in that tensor's pool."""
        tensors = np.repeat(np.arange(counts.size), counts)
        first = self._pool(key).picks(draws, range(counts.size), ())
        along = np.arange(tensors.size) - np.repeat(counts.cumsum() - counts, counts)
        return tensors, (first[tensors] + along) % self.seeds
