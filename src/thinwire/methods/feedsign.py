"""FeedSign (Cai et al., 2025): one bit a step travels each way, the sign of a directional derivative under one vote.

Step t of the run has the direction z_j, j = t mod K, of a pool that all know from one key, the same for all clients:

    b_it = sign(L(w + eps z_j) - L(w - eps z_j)) on client i's batch        v_t = sign(sum_i b_it)
    w <- w - lr v_t z_j

A client counts once, whatever its examples: one that lies moves a step to the other side at most, and no further. A
tie moves nothing. One step a round is the paper's; of several, a client takes the later ones where its own bits lead.
The whole run is its votes: w = w0 - lr sum_t v_t z_(t mod K), from which whoever comes late makes the weights of all.

Up: a bit a step, eight to a byte; only where a step had no sign (a loss that is not finite, or two that are equal), as
many bits more for which. Down: the votes since the version that the client holds, a bit each, and as many more bits for
which were ties, only where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from thinwire.aggregate.mean import Metrics
from thinwire.core import Client, Method, Server, StaleVersion
from thinwire.costs.frames import VERSION, Expected, Frames, Span
from thinwire.costs.memory import Memory, Side, holding, probing
from thinwire.costs.sketch import Pass, Sketch, Work
from thinwire.model.net import Net
from thinwire.perturb import probe, spsa
from thinwire.perturb.directions import Directions, Law
from thinwire.perturb.pool import Pool
from thinwire.wire import Illegal
from thinwire.wire.legal import check_keys

Signs = NDArray[np.int8]
VOTES = "votes"
MOST = 1 << 24  # votes of a run; more bits than that are no thin wire
REMEMBERED = 8  # versions, the last ones, that a server keeps


@dataclass(frozen=True)
class Votes:
    """The votes that follow those of the version `base`: `count` bits in bytes, 1: v = 1; `ties`: as many, 1: v = 0."""

    pool: int
    count: int
    bits: Tensor
    ties: Tensor | None
    base: str | None


@dataclass(frozen=True)
class Ballot:
    """A client's signs in the same form, 1: the loss rises along z; `silent`, 1: no sign. Examples, mean loss."""

    bits: Tensor = field(metadata={"release": True})
    silent: Tensor | None = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})


@dataclass(frozen=True)
class Run:
    """All votes so far, int8: 1, -1 or 0; and their version, which clients may hold."""

    pool: int
    votes: Tensor
    version: str | None = None


class FeedSign(Method):
    """Zeroth-order steps of one length, whose side is voted on; bits travel, whatever the model's size."""

    name: Literal["feedsign"] = "feedsign"
    seeds: int = Field(4096, ge=1, le=1 << 24)  # directions, one step after another; a rebuild costs as many at most
    lr: float = Field(1e-5, gt=0, le=100)
    eps: float = Field(5e-4, gt=0, le=100)
    law: Law = "sign"  # of the directions; gaussian is the paper's
    rank: int = Field(1, ge=1, le=1024)
    together: bool = False  # both sides of a step's probe in one forward pass: faster on small batches, more memory
    steps: PositiveInt = 1
    batch_size: PositiveInt = 16

    Down, Up, State = Votes, Ballot, Run
    paper: ClassVar[str] = "Cai et al. 2025, arXiv:2501.17610"
    leaves_last: ClassVar[bool] = True

    def init(self, server: Server) -> Run:
        return Run(server.key.fold("directions").word(), torch.zeros(0, dtype=torch.int8))

    def broadcast(self, state: Run, server: Server, client_id: int, held: str | None) -> Votes:
        known = server.versions.get(held) if held is not None else None
        since = state.votes.numpy()[0 if known is None else len(known[VOTES]) :]
        return Votes(state.pool, since.size, *packed(since), held if known is not None else None)

    def client_update(self, down: Votes, client: Client) -> Ballot:
        before = self._receive(down, client)
        scalars, loss = spsa.walk(
            client.net,
            Directions(down.pool, self.law, self.rank),
            ((before + np.arange(self.steps)) % self.seeds)[:, None],
            client.data.batches(client.key.fold("batches"), self.batch_size),
            lr=self.lr,
            eps=self.eps,
            together=self.together,
            applied=np.sign,
            last=False,
        )
        return Ballot(*packed(np.nan_to_num(scalars[:, 0]).astype(np.int8)), len(client.data), loss)

    def check(self, state: Run, client_id: int, up: Ballot) -> None:
        unpacked(up.bits, up.silent, self.steps)

    def aggregate(self, state: Run, server: Server, replies: Iterable[tuple[int, Ballot]]) -> tuple[Run, Metrics]:
        total, voters, silent = np.zeros(self.steps, np.int64), 0, 0
        losses: list[float] = []
        for _, up in replies:
            signs = unpacked(up.bits, up.silent, self.steps)
            total += signs
            voters, silent = voters + 1, silent + int((signs == 0).sum())
            losses += [up.loss] if math.isfinite(up.loss) else []
        if not voters:
            return state, {}
        votes = torch.cat([state.votes, torch.from_numpy(np.sign(total).astype(np.int8))])
        version = server.versions.put({VOTES: votes})
        agreed = float(np.abs(total).mean()) / voters
        loss = float(np.mean(losses)) if losses else 0.0
        return Run(state.pool, votes, version), {"loss": loss, "skipped": silent, "agreed": agreed}

    def materialise(self, state: Run, net: Net) -> None:
        self._rebuild(state.pool, state.votes.numpy(), net)

    def receive(self, down: Votes, client: Client) -> None:
        self._receive(down, client)

    def _receive(self, down: Votes, client: Client) -> int:
        """Fill the client's net; how many votes have made it."""
        check_keys(down.pool)
        known: Mapping[str, Tensor] | None = {VOTES: torch.zeros(0, dtype=torch.int8)}
        if down.base is not None:
            known = client.versions.get(down.base)
        if known is None or VOTES not in known:
            raise StaleVersion
        if not 0 <= down.count <= MOST:
            raise Illegal(f"{down.count} votes")
        votes = np.concatenate([known[VOTES].numpy(), unpacked(down.bits, down.ties, down.count)])
        if votes.size:
            client.held = client.versions.put({VOTES: torch.from_numpy(votes)})
        self._rebuild(down.pool, votes, client.net)
        return votes.size

    def _rebuild(self, key: int, votes: Signs, net: Net) -> None:
        # whole numbers, so that a round changes what a direction counts and not how it is rounded
        counts = np.bincount(np.arange(votes.size) % self.seeds, votes, self.seeds)
        Pool(Directions(key, self.law, self.rank), self.seeds).rebuild(net, torch.from_numpy(self.lr * counts).float())

    def reply_bytes(self, net: Net) -> int:
        return 2 * -(-self.steps // 8)

    def fits(self, net: Net) -> None:
        probe.check(net, Directions(0, self.law, self.rank), self.together, self.name)

    def work(self, round: int) -> Work:
        return spsa.work(self.steps, 1, self.batch_size, self.together)

    def frames(self, at: Expected) -> Frames | None:
        def bits(count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
            """Signs without any that is none, and with."""
            found = torch.empty(-(-count // 8), dtype=torch.uint8)
            yield found, None
            if count:
                yield found, found

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            last = max((n for n in range(1, round) if client in at.cohorts[n - 1]), default=1)
            held, there = at.examples[client], list[int]()
            for first in {last, 1} if round - last > REMEMBERED else {last}:  # who was away for long receives all votes
                count, base = self.steps * (round - first), VERSION if first > 1 else None
                there += [at.length(Votes(1 << 63, count, *two, base), round, client) for two in bits(count)]
            counts, mine = (1, 65535) if held is None else (held,), VERSION if round > 1 else None
            ballots = [Ballot(*two, examples, 0.0) for two in bits(self.steps) for examples in counts]
            back = [at.length(ballot, round, client, mine) for ballot in ballots]
            return Span(min(there), max(there)), Span(min(back), max(back))

        return frames

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        kept = at.trained_bytes  # Net.rebuild keeps a copy for the next visit
        return probing(at, forward, self.law, kept) if side == "client" else holding(at, kept)


def packed(signs: Signs) -> tuple[Tensor, Tensor | None]:
    """1, -1 and 0, int8 [n], as bits, eight to a byte: which are 1; and which are 0, None where none is."""
    none = signs == 0
    return _bytes(signs > 0), _bytes(none) if none.any() else None


def unpacked(bits: Tensor, none: Tensor | None, count: int) -> Signs:
    """The inverse for `count` signs, int8; Illegal for what `packed` would not have made."""
    up, zero = _bits(bits, count), np.zeros(count, bool) if none is None else _bits(none, count)
    if (up & zero).any() or (none is not None and not zero.any()):
        raise Illegal("a sign that is none")
    return np.where(zero, 0, np.where(up, 1, -1)).astype(np.int8)


def _bytes(bits: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.packbits(bits))


def _bits(sent: Tensor, count: int) -> NDArray[np.bool_]:
    if sent.dtype != torch.uint8 or sent.shape != (-(-count // 8),):
        raise Illegal(f"signs are {sent.dtype} {list(sent.shape)}, not uint8 [{-(-count // 8)}]")
    found = np.unpackbits(sent.numpy()).astype(bool)
    if found[count:].any():
        raise Illegal(f"more signs than {count}")
    return found[:count]
