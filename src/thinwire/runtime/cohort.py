"""Who takes part in a round: data, not code of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from thinwire.errors import ConfigError
from thinwire.keys import Key

if TYPE_CHECKING:
    from thinwire.core import Method


class _Cohort(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: PositiveInt | None = None  # how long this segment lasts; None: to the end of the run


class All(_Cohort):
    """Every client, every round."""

    kind: Literal["all"] = "all"

    def pick(self, clients: Sequence[int], turn: int, key: Key) -> tuple[int, ...]:
        """The clients of turn `turn` (from 0) of this segment."""
        return tuple(clients)


class Uniform(_Cohort):
    """`n` distinct clients, uniform at random each round; all of them where there are not so many."""

    kind: Literal["uniform"] = "uniform"
    n: PositiveInt

    def pick(self, clients: Sequence[int], turn: int, key: Key) -> tuple[int, ...]:
        """The clients of turn `turn` (from 0) of this segment, in ascending order."""
        return tuple(sorted(clients[i] for i in key.permutation(len(clients))[: self.n]))


class Cyclic(_Cohort):
    """One client a round, each in its turn."""

    kind: Literal["cyclic"] = "cyclic"

    def pick(self, clients: Sequence[int], turn: int, key: Key) -> tuple[int, ...]:
        """The client of turn `turn` (from 0) of this segment."""
        return (clients[turn % len(clients)],)


class Only(_Cohort):
    """These clients alone, every round; counted from 0 in the order of the run's clients."""

    kind: Literal["only"] = "only"
    clients: tuple[NonNegativeInt, ...] = Field(min_length=1)

    def pick(self, clients: Sequence[int], turn: int, key: Key) -> tuple[int, ...]:
        """Its clients, which are there: see check_clients."""
        return tuple(client for client in clients if client in self.clients)


Segment = All | Uniform | Cyclic | Only
Cohort = Annotated[Segment, Field(discriminator="kind")]


def check_clients(segments: Sequence[Segment], clients: int) -> None:
    """ConfigError for a segment that names clients which are not among the `clients` that there are."""
    for i, segment in enumerate(segments):
        unknown = [id for id in segment.clients if id >= clients] if isinstance(segment, Only) else []
        if unknown:
            there = f"are {clients} clients, 0 to {clients - 1}" if clients > 1 else "is one client, 0"
            raise ConfigError(f"cohort.{i}.clients: no client {', '.join(map(str, unknown))}: there {there}")


def check(segments: Sequence[Segment], method: Method, clients: int) -> None:
    """ConfigError where cohorts or a method name clients that are not there, or a round has too few for the method."""
    check_clients(segments, clients)
    method.check_clients(clients)
    for segment in segments:
        method.check_cohort(len(segment.pick(range(clients), 0, Key.root(0))))


def cohort_of(segments: Sequence[Segment], clients: Sequence[int], round: int, key: Key) -> tuple[int, ...]:
    """The clients of round `round` (from 1) under consecutive segments; the last one goes on for ever."""
    turn = round - 1
    for segment in segments[:-1]:
        if segment.rounds is None or turn < segment.rounds:
            return segment.pick(clients, turn, key)
        turn -= segment.rounds
    return segments[-1].pick(clients, turn, key)
