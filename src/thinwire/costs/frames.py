"""Bytes before a run: the frames that a method would send, encoded without their numbers.

Frames of fixed size are exact. Where an entropy coder decides, a range is given: a server half that needs no weights is
really run, on replies drawn at random; coded differences of weights are estimated by the rate and the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from thinwire import wire

VERSION = "0" * 32  # as long as the name of a version
SIMULATED = 4000  # visits that are run through a server half at most


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


Frames = Callable[[int, int, bool], tuple[Span, Span]]  # round, client, newcomer -> down, up


@dataclass(frozen=True)
class Expected:
    """The run that is expected: what is trained, as tensors without memory; who takes part, and in which rounds.

    `examples`: of each client, None where the rows are not at hand. `server`: the server of a round, its cohort and
    its versions, which has no net. `width`: of a token's embedding; `classes`: of answers, at most; None: not known.
    """

    trained: Mapping[str, Tensor]
    identity: int
    examples: Sequence[int | None]
    cohorts: Sequence[Sequence[int]]
    server: Callable[[int, Sequence[int], Any], Any]
    width: int | None = None
    classes: int | None = None

    def length(self, payload: Any, round: int = 0, client: int = 0, held: str | None = None) -> int:
        """The length of a payload's frame."""
        return wire.frame.length(payload, run=self.identity, round=round, client=client, held=held)


def fixed(at: Expected, down: Any, up: Callable[[int], Any]) -> Frames:
    """Frames that hold the same tensors every time: they differ by the digits of round, client and examples.

    `up` makes the reply of a client with so many examples.
    """
    sizes: dict[tuple[int, ...], int] = {}

    def size(round: int, client: int, examples: int | None) -> int:
        digits = (_digits(round), _digits(client), 0 if examples is None else _digits(examples))
        if digits not in sizes:
            sizes[digits] = at.length(down if examples is None else up(examples), round, client)
        return sizes[digits]

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        there, held = size(round, client, None), at.examples[client]
        ends = [size(round, client, count) for count in ((1, 65535) if held is None else (held,))]
        return Span(there, there), Span(min(ends), max(ends))

    return frames


def between(few: Frames, many: Frames) -> Frames:
    """From the least of some frames to the most of others, where a client's rows decide which it sends."""

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        (low, least), (high, most) = few(round, client, new), many(round, client, new)
        return Span(low.least, high.most), Span(least.least, most.most)

    return frames


def _digits(number: int) -> int:
    """Bytes of a count that is no less than 0, as msgpack writes it."""
    return next(
        size for size, end in ((1, 1 << 7), (2, 1 << 8), (3, 1 << 16), (5, 1 << 32), (9, 1 << 64)) if number < end
    )


class _Versions:
    """Versions that are kept in memory, and named as in a run."""

    def __init__(self) -> None:
        self.kept: dict[str, Mapping[str, Tensor]] = {}

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        name = f"{len(self.kept):032d}"
        self.kept[name] = tensors
        return name

    def get(self, version: str) -> Mapping[str, Tensor] | None:
        return self.kept.get(version)


def simulated(
    half: Any,
    at: Expected,
    reply: Callable[[np.random.Generator, int], Any],
    holds: Callable[[Any], Mapping[str, Tensor]] | None = None,
) -> Frames:
    """A method's server half, which asks its net for nothing, run on replies drawn at random of so many examples each.

    `holds`: what of a state its clients keep as a version, coded against which they are sent the next; None: frames
    that do not depend on the numbers in them.
    """
    versions, generator = _Versions(), np.random.Generator(np.random.Philox(0))
    held: dict[int, str] = {}
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    last, state = 1, half.init(at.server(0, (), versions))
    for round, cohort in enumerate(at.cohorts, 1):
        if len(sizes) > SIMULATED:
            break
        here, replies, version = at.server(round, cohort, versions), [], None
        for client in cohort:
            down = half.broadcast(state, here, client, held.get(client))
            if version is None and holds is not None:
                version = versions.put(holds(state))
            up = reply(generator, at.examples[client] or 65535)
            length = at.length(up, round, client, None if holds is None else VERSION)
            sizes[round, client] = at.length(down, round, client), length
            replies.append((client, up))
            if version is not None:
                held[client] = version
        state, _ = half.aggregate(state, here, iter(replies))
        last = round

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        down, up = sizes.get((round, client)) or sizes[last, at.cohorts[last - 1][0]]
        low = up - (0 if at.examples[client] is not None else 2)
        if holds is None:
            return Span(down, down), Span(low, up)
        # levels of real scalars have longer tails, and grow as the scalars do; a beginning has none
        slack = max(0, down - 100) / 3
        beyond = 1.0 if round <= last else 1.0 + 0.25 * math.log2(round / last)
        return Span(down - slack - 4, (down + slack) * beyond + 4), Span(low, up)

    return frames
