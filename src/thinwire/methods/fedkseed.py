"""FedKSeed and FedKSeed-Pro (Qin et al., 2024): full-parameter tuning in which only seeds and scalars travel.

A pool of K directions z_j is known to all from one key. The global model *is* the start model and K numbers:
w = s w0 - sum_j A_j z_j. Each local step draws j, measures g = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps) with two
forward passes and moves w by -lr g z_j.

Down: the pool's key, A (float32), the round's lr; with Pro the probabilities of the K directions. Up: one pair
(direction, g) a step, in order. A accumulates lr times g and not g, so that lr may change from round to round.
s is the product of the steps' weight decays, 1 without: decay is applied once a step, in training and in rebuild alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from thinwire.core import Client, Method, Metrics, Server
from thinwire.model.flat import Net
from thinwire.perturb.directions import Directions, Law
from thinwire.perturb.probe import Probe
from thinwire.train.schedule import Schedule, scheduled
from thinwire.wire import Illegal, raw

LARGEST = 1e6  # a directional derivative beyond this is no measurement of a loss


@dataclass(frozen=True)
class Gains:
    """The global model as a client is told it. gains: float32 [K]. probabilities: float32 [K], None: uniform."""

    pool: int
    gains: Tensor
    shrink: float
    lr: float
    probabilities: Tensor | None


@dataclass(frozen=True)
class Steps:
    """A client's steps in order: seeds int32 [taken], scalars float32 [taken]; its examples, mean loss, skips."""

    seeds: Tensor = field(metadata={"release": True})
    scalars: Tensor = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


@dataclass(frozen=True)
class Accumulators:
    """The server's memory. gains, and the sum and the count of |g| for each direction: float64 [K]."""

    pool: int
    gains: Tensor
    shrink: float
    amplitude: Tensor
    visits: Tensor


class FedKSeed(Method):
    """Zeroth-order steps along K shared directions; kilobytes a round, whatever the model's size."""

    name: Literal["fedkseed"] = "fedkseed"
    seeds: int = Field(4096, ge=1, le=1 << 24)
    pro: bool = False
    lr: float = Field(1e-5, gt=0, le=100)
    schedule: Schedule = "constant"
    eps: float = Field(5e-4, gt=0, le=100)
    law: Law = "gaussian"  # of the directions; gaussian is the paper's
    rank: int = Field(1, ge=1, le=1024)  # of a matrix's direction, with law = "lowrank"
    together: bool = False  # both sides of a probe in one forward pass: faster on small batches, for more memory
    weight_decay: NonNegativeFloat = 0.0
    steps: PositiveInt = 200
    batch_size: PositiveInt = 1
    weighting: Literal["examples", "uniform"] = "examples"
    amplitude_clip: PositiveFloat = 1000.0  # Pro: bounds |g| in the statistic alone, not in the update

    Down, Up, State = Gains, Steps, Accumulators
    paper: ClassVar[str] = "Qin et al. 2024, arXiv:2312.06353"

    def init(self, server: Server) -> Accumulators:
        pool = server.key.fold("directions").word()
        zeros = torch.zeros(self.seeds, dtype=torch.float64)
        # The paper's history of each direction begins with one amplitude of 0.
        return Accumulators(pool, zeros, 1.0, zeros.clone(), torch.ones_like(zeros))

    def broadcast(self, state: Accumulators, server: Server, client_id: int, held: str | None) -> Gains:
        lr = scheduled(self.schedule, self.lr, server.round, server.rounds)
        probabilities = seed_probabilities(state.amplitude / state.visits).float() if self.pro else None
        return Gains(state.pool, state.gains.float(), state.shrink, lr, probabilities)

    def client_update(self, down: Gains, client: Client) -> Steps:
        self.receive(down, client)
        directions = Directions(down.pool, self.law, self.rank)
        batches = client.data.batches(client.key.fold("batches"), self.batch_size)
        picks = self._draw(down, client)
        shrink = self._shrink(down.lr)
        seeds, scalars, losses = [], [], []
        with Probe(client.net, directions, self.together) as probe:
            for step, (batch, seed) in enumerate(zip(islice(batches, self.steps), picks, strict=True), 1):
                ((plus, minus),) = probe.losses(batch, [seed], self.eps)
                # What travels is what is applied, so that a rebuild repeats the training.
                scalar = float(np.float32((plus - minus) / (2 * self.eps)))
                if not math.isfinite(scalar) or abs(scalar) > LARGEST:
                    continue
                if step < self.steps:  # nobody would see the last move: the server makes it from the scalar
                    move(client.net, directions, seed, -down.lr * scalar, shrink)
                seeds.append(seed)
                scalars.append(scalar)
                losses.append((plus + minus) / 2)
        loss = sum(losses) / len(losses) if losses else math.nan
        skipped = self.steps - len(seeds)
        return Steps(torch.tensor(seeds, dtype=torch.int32), torch.tensor(scalars), len(client.data), loss, skipped)

    def check(self, state: Accumulators, client_id: int, up: Steps) -> None:
        if up.seeds.dtype != torch.int32 or up.scalars.dtype != torch.float32:
            raise Illegal(f"pairs of {up.seeds.dtype} and {up.scalars.dtype}, not of int32 and float32")
        if up.seeds.ndim != 1 or up.seeds.shape != up.scalars.shape or len(up.seeds) + up.skipped != self.steps:
            raise Illegal(f"{list(up.seeds.shape)} pairs and {up.skipped} skipped are not {self.steps} steps")
        if len(up.seeds) and (up.seeds.min() < 0 or up.seeds.max() >= self.seeds):
            raise Illegal(f"a direction outside the pool of {self.seeds}")
        if not torch.isfinite(up.scalars).all() or (up.scalars.abs() > LARGEST).any():
            raise Illegal(f"a scalar is not finite, or beyond {LARGEST:g}")
        if up.examples < 1:
            raise Illegal(f"examples is {up.examples}")

    def aggregate(
        self, state: Accumulators, server: Server, replies: Iterable[tuple[int, Steps]]
    ) -> tuple[Accumulators, Metrics]:
        lr = scheduled(self.schedule, self.lr, server.round, server.rounds)
        gains, shrink = np.zeros(self.seeds), 0.0
        amplitude, visits = state.amplitude.numpy().copy(), state.visits.numpy().copy()
        total, loss, measured, skipped = 0, 0.0, 0, 0
        for _, up in replies:
            weight = up.examples if self.weighting == "examples" else 1
            seeds, scalars = up.seeds.numpy(), up.scalars.numpy().astype(np.float64)
            # The client's weights are D w - sum_t lr g_t s^(steps after t) z_t, with s = 1 - lr wd and D = s^steps.
            kept = self._shrink(lr) ** np.arange(len(seeds), -1, -1, dtype=np.float64)
            np.add.at(gains, seeds, weight * lr * scalars * kept[1:])
            shrink += weight * float(kept[0])
            np.add.at(amplitude, seeds, np.minimum(np.abs(scalars), self.amplitude_clip))
            np.add.at(visits, seeds, 1.0)
            total, skipped = total + weight, skipped + up.skipped
            if math.isfinite(up.loss):
                measured += weight
                loss += (up.loss - loss) * weight / measured
        if total == 0:
            return state, {}
        shrink /= total
        gains = shrink * state.gains.numpy() + gains / total
        metrics = {"loss": loss, "skipped": skipped, "directions": int(np.count_nonzero(gains))}
        return (
            Accumulators(
                state.pool,
                torch.from_numpy(gains),
                state.shrink * shrink,
                torch.from_numpy(amplitude),
                torch.from_numpy(visits),
            ),
            metrics,
        )

    def materialise(self, state: Accumulators, net: Net) -> None:
        rebuild(net, Directions(state.pool, self.law, self.rank), state.gains.float(), state.shrink)

    def receive(self, down: Gains, client: Client) -> None:
        if down.gains.dtype != torch.float32 or down.gains.shape != (self.seeds,):
            raise Illegal(f"gains are {down.gains.dtype} {list(down.gains.shape)}, not float32 [{self.seeds}]")
        if not torch.isfinite(down.gains).all() or not math.isfinite(down.shrink) or not math.isfinite(down.lr):
            raise Illegal("gains, shrink or lr are not finite")
        rebuild(client.net, Directions(down.pool, self.law, self.rank), down.gains, down.shrink)

    def _shrink(self, lr: float) -> float:
        """What one step leaves of the weights; rounded as it is applied, or the roundings would add up."""
        return float(np.float32(1.0 - lr * self.weight_decay))

    def _draw(self, down: Gains, client: Client) -> list[int]:
        key = client.key.fold("seeds")
        if down.probabilities is None:
            return key.integers(self.seeds, self.steps).tolist()
        p = down.probabilities
        if p.dtype != torch.float32 or p.shape != (self.seeds,) or not (p >= 0).all() or not 0 < float(p.sum()) < 2:
            raise Illegal(f"probabilities are not {self.seeds} shares of 1")
        cumulative = np.cumsum(p.numpy().astype(np.float64))
        drawn = np.searchsorted(cumulative, key.uniform(self.steps) * cumulative[-1], side="right")
        return np.minimum(drawn, self.seeds - 1).tolist()


def move(net: Net, directions: Directions, seed: int, coef: float, shrink: float) -> None:
    """weights := shrink weights + coef z_seed."""
    for name, parameter in net.parameters():
        directions.apply(parameter.data, name, [seed], [coef], scale=shrink, out=parameter.data)


def rebuild(net: Net, directions: Directions, gains: Tensor, shrink: float) -> None:
    """weights := shrink w0 - sum_j gains_j z_j in the order of j, whatever the history; a gain of 0 costs nothing.

    gains: float32 [K].
    """
    token = hashlib.sha256(f"fedkseed {directions} {shrink!r} ".encode() + bytes(raw(gains))).digest()
    coefs = -gains.numpy().astype(np.float64)
    touched: NDArray[np.int64] = np.flatnonzero(coefs)

    def build() -> None:
        for name, parameter in net.parameters():
            directions.apply(net.base[name], name, touched, coefs[touched], scale=shrink, out=parameter.data)

    net.rebuild(token, build)


def seed_probabilities(amplitudes: Tensor) -> Tensor:
    """FedKSeed-Pro's softmax of the min-max normalised mean |g| of each direction; float64 [K], sums to 1."""
    low, high = amplitudes.min(), amplitudes.max()
    return torch.softmax((amplitudes - low) / (high - low + 1e-10), dim=0)
