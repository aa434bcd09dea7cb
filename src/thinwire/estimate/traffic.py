"""Bytes before a run: the frames that a method would send, encoded without their numbers.

Frames of fixed size are exact. Where an entropy coder decides, a range is given: FedKSeed's server half is really run,
on scalars drawn at random; coded differences of weights are told by the rate and the steps, as measured in LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinwire import wire
from thinwire.compress.catalogue import LEARNT
from thinwire.compress.codecs.eden import Eden
from thinwire.compress.codecs.factors import Factors
from thinwire.compress.codecs.topk import TopK
from thinwire.compress.learned import codec_file, components
from thinwire.config import Run
from thinwire.keys import Key
from thinwire.methods.cgfed import NONE, CGFed, Coded, Told
from thinwire.methods.fedavg import FedAvg, Weights
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.methods.fedkseed import FORMS, FedKSeed, Steps
from thinwire.methods.fedzo import FedZO, Start
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.model.errors import ModelError
from thinwire.runtime.seats import Seats
from thinwire.train.versions import Exact
from thinwire.train.weights import Trained

VERSION = "0" * 32  # as long as the name of a version
SIMULATED = 4000  # visits that are run through FedKSeed's server half at most


@dataclass(frozen=True)
class Span:
    """From the least to the most bytes, and whether they are one number."""

    least: float
    most: float

    def __add__(self, other: Span) -> Span:
        return Span(self.least + other.least, self.most + other.most)

    @property
    def exact(self) -> bool:
        """Whether it is no range."""
        return self.least == self.most

    def holds(self, count: float) -> bool:
        """Whether so many bytes are within."""
        return math.floor(self.least) <= count <= math.ceil(self.most)


@dataclass(frozen=True)
class Traffic:
    """Of one visit of a newcomer and of one that returns, and of the run in all: bytes (down, up)."""

    newcomer: tuple[Span, Span]
    returning: tuple[Span, Span]
    total: tuple[Span, Span]
    visits: int


@dataclass
class Federation:
    """Who would take part: the examples of each client, None where the rows are not at hand."""

    run: Run
    identity: int
    examples: Sequence[int | None]
    cohorts: list[Sequence[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        seats, clients = Seats(Key.root(self.run.seed), self.run.rounds), len(self.examples)
        self.cohorts = [seats.cohort(self.run.cohort, clients, round) for round in range(1, self.run.rounds + 1)]


Frames = Callable[[int, int, bool], tuple[Span, Span]]  # round, client, newcomer -> down, up


def traffic(at: Federation, trained: Mapping[str, Tensor]) -> Traffic | None:
    """What the run would send; None for a method of the user's own, of which nothing is known."""
    frames = _frames(at, trained)
    if frames is None:
        return None
    seen: set[int] = set()
    down, up = Span(0, 0), Span(0, 0)
    first = later = None
    for round, cohort in enumerate(at.cohorts, 1):
        for client in cohort:
            new = client not in seen
            sent = frames(round, client, new)
            down, up = down + sent[0], up + sent[1]
            first = first or sent
            later = sent if not new else later
        seen.update(cohort)
    assert first is not None
    return Traffic(first, later or first, (down, up), sum(map(len, at.cohorts)))


def _frames(at: Federation, trained: Mapping[str, Tensor]) -> Frames | None:
    method = at.run.method
    if isinstance(method, FedAvg):
        return _whole(at, Weights(trained, 0.0), trained)
    if isinstance(method, FedZO):
        return _whole(at, Start(trained, 1 << 63, 1 << 63, 0.0), trained)
    if isinstance(method, FedKSeed):
        return _simulated(at, method)
    if isinstance(method, GradualDiff):
        return _differences(at, method, trained)
    if isinstance(method, FedCyBGD):
        return _blocks(at, method, trained)
    if isinstance(method, CGFed):
        return _codes(at, method, trained)
    return None


def _whole(at: Federation, down: Any, trained: Mapping[str, Tensor]) -> Frames:
    """Frames that hold the same tensors every time: they differ by the digits of round, client and examples."""
    sizes: dict[tuple[bool, int, int, int], int] = {}

    def size(payload: Any, round: int, client: int, examples: int) -> int:
        at_hand = (payload is down, _digits(round), _digits(client), _digits(examples))
        if at_hand not in sizes:
            sizes[at_hand] = wire.frame.length(payload, run=at.identity, round=round, client=client)
        return sizes[at_hand]

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        told = size(down, round, client, 0)
        held = at.examples[client]
        ends = [size(Trained(trained, n, 0.0, 0), round, client, n) for n in ((1, 65535) if held is None else (held,))]
        return Span(told, told), Span(min(ends), max(ends))

    return frames


def _digits(number: int) -> int:
    """Bytes of a count that is no less than 0, as msgpack writes it."""
    return next(
        size for size, end in ((1, 1 << 7), (2, 1 << 8), (3, 1 << 16), (5, 1 << 32), (9, 1 << 64)) if number < end
    )


class _Memory:
    """Versions that are kept in memory, and named as in a run."""

    def __init__(self) -> None:
        self.kept: dict[str, Mapping[str, Tensor]] = {}

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        name = f"{len(self.kept):032d}"
        self.kept[name] = tensors
        return name

    def get(self, version: str) -> Mapping[str, Tensor] | None:
        return self.kept.get(version)


def _simulated(at: Federation, method: FedKSeed) -> Frames:
    """FedKSeed's own server half, on scalars drawn at random: what is coded is how often a direction was drawn."""
    versions, generator = _Memory(), np.random.Generator(np.random.Philox(0))
    form = FORMS["float32" if method.wire == "paper" else method.scalars]
    count = method.steps * method.queries
    seeds = torch.zeros(count, dtype=torch.int32) if method.wire == "paper" else None
    held: dict[int, str] = {}
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    visits, last = 0, 1

    server = Seats(Key.root(at.run.seed), at.run.rounds, versions=versions).server
    state = method.init(server(0))
    for round, cohort in enumerate(at.cohorts, 1):
        if visits > SIMULATED:
            break
        here, replies, version = server(round, cohort), [], None
        for client in cohort:
            told = method.broadcast(state, here, client, held.get(client))
            if version is None and method.wire == "thin":
                version = versions.put({"levels": torch.from_numpy(method._levels(state))})
            numbers = torch.from_numpy(generator.standard_normal(count))
            scalars = numbers.to(form) if form.is_floating_point else (numbers * 30).clamp(-127, 127).to(form)
            up = Steps(seeds, scalars, 1.0, at.examples[client] or 65535, 0.0)
            places = {"run": at.identity, "round": round, "client": client}
            sizes[round, client] = (
                wire.frame.length(told, **places),
                wire.frame.length(up, **places, held=VERSION if method.wire == "thin" else None),
            )
            replies.append((client, up))
            if version is not None:
                held[client] = version
        state, _ = method.aggregate(state, here, iter(replies))
        visits, last = visits + len(cohort), round

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        down, up = sizes.get((round, client)) or next(iter(sizes[last, c] for c in at.cohorts[last - 1]))
        low = up - (0 if at.examples[client] is not None else 2)
        if method.wire == "paper":
            return Span(down, down), Span(low, up)
        # levels of real scalars have longer tails, and grow as the scalars do; a beginning has none
        slack = max(0, down - 100) / 3
        beyond = 1.0 if round <= last else 1.0 + 0.25 * math.log2(round / last)
        return Span(down - slack - 4, (down + slack) * beyond + 4), Span(low, up)

    return frames


def coded_bits(method: Exact, dtype: torch.dtype) -> tuple[float, float]:
    """From the fewest to the most bits a weight that a local visit's exact difference takes.

    A weight moves by about lr sqrt(steps) under AdamW. In bfloat16 that took 0.50 bits at 4e-5, 0.56 at 4.5e-5 and 1.9
    at 3.2e-4 with stochastic rounding, and about 0.6 of it without (LOG.md): bits = 0.52 (move / 4.2e-5)^0.62, to
    within a factor of two on either side. Each further bit of the dtype's mantissa is one more to tell.
    """
    whole = 8.0 * dtype.itemsize
    if method.optimiser != "adamw":
        return 0.01, whole
    move = method.lr * math.sqrt(method.steps)
    bits = 0.52 * (move / 4.2e-5) ** 0.62 * (1.0 if method.rounding == "stochastic" else 0.6)
    bits += {torch.bfloat16: 0, torch.float16: 3, torch.float32: 16}[dtype]
    return bits / 2, min(whole, bits * 2)


def _differences(at: Federation, method: GradualDiff, trained: Mapping[str, Tensor]) -> Frames:
    from thinwire.methods.gradualdiff import Change, Difference

    dtype = method.held_dtype(next(iter(trained.values())).dtype)
    values = sum(t.numel() for t in trained.values())
    low, high = coded_bits(method, dtype)
    lossy = None if method.codec == "lossless" else [_lossy(method, trained, down) for down in (True, False)]
    empty = {name: torch.empty(0, dtype=torch.uint8) for name in trained}
    heads = [
        wire.frame.length(Change(VERSION, VERSION, VERSION, True, 1 << 63, empty, 0.0), run=at.identity),
        wire.frame.length(Difference(VERSION, 1 << 63, empty, 65535, 0.0, 0), run=at.identity, held=VERSION),
    ]
    slack = 15 * len(trained)  # digits of each tensor's length, and what the coder puts in front of it

    def coded(head: int, bits: float, more: float) -> float:
        return head + more + bits * values / 8

    def step(up: int) -> Span:
        """The server's step of one round (0), or a client's (1)."""
        head = heads[up]
        if lossy is not None:
            return Span(head + lossy[up].least - slack, head + lossy[up].most + 4 * slack)
        return Span(coded(head, low, 0), coded(head, high, 4 * slack))

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        up = step(1)
        if new and method.start == "sent":
            # without an old one a bfloat16 weight takes 10.6 bits; mantissas of others do not get shorter
            whole = {torch.bfloat16: 10.6, torch.float16: 13.5, torch.float32: 26.6}[dtype]
            return Span(coded(heads[0], 0.85 * whole, 0), coded(heads[0], 8.0 * dtype.itemsize, 4 * slack)), up
        if round == 1:
            return Span(heads[0] - 40 * len(trained), heads[0] + 4 * slack), up
        if lossy is not None and not new and client in at.cohorts[round - 2]:
            return step(0), up
        rounds = round - 1 if new else 1  # a newcomer is told all that has happened
        # who was away is told the exact difference of two versions, whatever the codec
        return Span(coded(heads[0], low / 2, 0), coded(heads[0], high * rounds**0.5, 4 * slack)), up

    return frames


def _lossy(method: GradualDiff, trained: Mapping[str, Tensor], down: bool) -> Span:
    """The bytes of all tensors' codes, down or up; top-k's positions are entropy-coded, and what is gated has none."""
    code = method.code(down)
    if isinstance(code, Factors):
        size = sum(code.size(tuple(tensor.shape)) for tensor in trained.values())
    elif isinstance(code, TopK):
        most = sum(code.most(tensor.numel()) for tensor in trained.values())
        return Span(0 if method.gate else 0.8 * most, most)
    else:
        size = sum(code.size(tensor.numel()) for tensor in trained.values())
    return Span(size, size)


def _codes(at: Federation, method: CGFed, trained: Mapping[str, Tensor]) -> Frames:
    """Down the factors, to a newcomer with the codec, or a coded step; up a code at the ratio, or somewhat less."""
    values = sum(t.numel() for t in trained.values())
    codec: Mapping[str, Tensor] = components.untaught() if method.codec == "components" else {}
    if method.codec in LEARNT and method.artefact is not None and Path(method.artefact).exists():
        try:
            codec = codec_file.read(Path(method.artefact)).tensors
        except ValueError as error:
            raise ModelError(f"method.artefact: {error}") from None
    version = VERSION if method.downlink == "coded" else NONE
    codec_version = VERSION if codec or method.codec in LEARNT else NONE
    exact = {"none": 4 * values, "eden": Eden(32 / method.ratio).size(values)}.get(method.codec)
    sizes = (2 * values // method.ratio, 4 * values // method.ratio) if exact is None else (exact, exact)

    def told(new: bool, coded: bool) -> int:
        step = torch.empty(Eden(32 / method.ratio).size(values), dtype=torch.uint8) if coded else None
        base = VERSION if coded else NONE
        known = {} if coded else trained
        key = 1 << 63 if version != NONE else 0
        payload = Told(known, base, version, step, key, codec if new else {}, codec_version, 0.0)
        return wire.frame.length(payload, run=at.identity)

    def answered(size: int) -> int:
        payload = Coded(torch.empty(size, dtype=torch.uint8), 1 << 63, False, 0.0, 65535, 0.0, 0)
        return wire.frame.length(payload, run=at.identity, held=f"{version} {codec_version}")

    digits = 24  # of round, client and key, in all
    up = Span(answered(sizes[0]) - digits, answered(sizes[1]) + digits)

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        coded = version != NONE and not new and client in at.cohorts[round - 2]
        down = told(new, coded)
        return Span(down - digits, down + digits), up

    return frames


def _blocks(at: Federation, method: FedCyBGD, trained: Mapping[str, Tensor]) -> Frames:
    """A turn's block, and the proxy around it: what has changed of it, a block for each turn that has been."""
    dtype = method.held_dtype(next(iter(trained.values())).dtype)
    values = sum(t.numel() for t in trained.values())
    outside = sum(t.numel() for name, t in trained.items() if not any(part.isdigit() for part in name.split(".")))
    block = (values - outside) / method.blocks
    # in the turn of one of the last blocks, and in any other
    few, most_own = max(1, method.common) * block, min(method.blocks, method.common + 1) * block
    if method.variant == "full":
        few = most_own = values
    whole = 8.0 * dtype.itemsize
    low, high = coded_bits(method, dtype) if method.coded else (whole, whole)
    around = whole if method.around == "exact" else int(method.around[0]) + 1 / 8
    names = sum(len(name) + 8 for name in trained)
    slack = 4 * names  # what a coder puts in front of each tensor

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        up = Span(low * few / 8, high * most_own / 8 + slack)
        if not method.coded or (new and method.start == "sent"):
            left = max(values - method.drop * (values - outside) - few, 0)
            least = few * whole + (1 - method.prune) * left * around
            most = most_own * whole + (values - most_own) * around
            return Span((0.6 if method.coded else 1.0) * least / 8, most / 8 + slack), up
        turns = min(round - 1, method.blocks)
        rough = method.around != "exact" and method.start == "sent"  # what a client has of a block that was not its own
        most = min(high, around) * block * turns + (whole if rough else high) * most_own
        return Span(names / 8, most / 8 + slack), up

    return frames


def verdict(said: Traffic, down: int, up: int) -> str:
    """Whether the bytes of a run that has ended are within what was said, and by how much they are not."""
    parts = []
    for name, span, count in (("down", said.total[0], down), ("up", said.total[1], up)):
        if span.holds(count):
            parts.append(f"{name} hit" + ("" if span.exact else f" (range 1 to {span.most / max(1, span.least):.1f})"))
        else:
            edge = span.least if count < span.least else span.most
            parts.append(f"{name} missed by {count / edge - 1:+.1%}")
    return f"bytes against the estimate: {', '.join(parts)}"
