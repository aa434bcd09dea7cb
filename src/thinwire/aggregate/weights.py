"""Who counts how much in a round, by agreement: by examples, equally or by a table, within bounds, and fairly.

    p_k = n_k stale^(rounds late) / their sum            n_k: examples, 1, or the share in the table
    q_k = clip(t p_k, floor, cap)                        with t such that they sum to 1
    l   = argmax sum_k l_k f_k                           where |l_k - q_k| <= fair, floor <= l_k <= cap, sum_k l_k = 1

f_k is the loss that client k reports of its local steps. The last is the weighting of OTA-FFL's modified Chebyshev
problem (arXiv:2501.03392) in closed form: each begins at its least, and what is then left goes to the highest losses.
With fair = 0 it is q, with fair = 1 and no bounds all of it is the worst-served client's (AFL).

q and l follow from all replies of a round: their files then stay until it has ended, and their tensors are read after
the last has come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator

Shares = NDArray[np.float64]
NEAR = 1e-9  # shares that differ by less are one


class Agreement(BaseModel):
    """How much a client's reply counts in the mean of a round.

    `by`: its examples; all alike; a `table` of the clients' shares, by name, which sum to 1; or as the method's own
    `weighting` has it. Who is absent leaves its share to the others, in proportion.

    Then no client counts for more than `cap` of a round, and none that replies for less than `floor`; `fair`: how far a
    share may move from there towards the clients that report the highest loss. A reply that is so many rounds late
    counts `stale` to that power.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["method", "examples", "equal", "table"] = "method"
    table: dict[str, PositiveFloat] | None = None
    cap: float = Field(1.0, gt=0, le=1)
    floor: float = Field(0.0, ge=0, lt=1)
    fair: float = Field(0.0, ge=0, le=1)
    stale: float = Field(1.0, gt=0, le=1)

    @field_validator("table")
    @classmethod
    def _whole(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and abs(total := math.fsum(value.values()) - 1) > 1e-6:
            raise ValueError(f"its shares sum to {total + 1:.6g}, not to 1")
        return value

    @model_validator(mode="after")
    def _pairs(self) -> Agreement:
        if (self.by == "table") != (self.table is not None):
            raise ValueError('by = "table" and a table go together')
        if self.floor > self.cap:
            raise ValueError(f"a floor of {self.floor:g} is above the cap of {self.cap:g}")
        return self

    @property
    def bounded(self) -> bool:
        """Whether a share depends on who else replies, and on what."""
        return self.cap < 1 or self.floor > 0 or self.fair > 0


class Share(NamedTuple):
    """How much of a round a client's reply was, and why."""

    share: float
    why: str


class Weighing:
    """How much each reply of one round counts; `shares` then has who counted, with the reason.

    `names`: of all clients of the run, by number; `late`: client -> how many rounds ago its reply was asked for.
    """

    def __init__(
        self, agreement: Agreement | None = None, names: Sequence[str] = (), late: Mapping[int, int] | None = None
    ) -> None:
        self.agreement, self.names, self.late = agreement, names, late or {}
        self.shares: dict[int, Share] = {}

    @property
    def keeps_all(self) -> bool:
        """Whether no reply's share is known before the last has come: all of them are kept until then."""
        return self.agreement is not None and self.agreement.bounded

    def __call__(
        self, replies: Iterable[tuple[int, Any]], own: Callable[[Any], float]
    ) -> Iterator[tuple[int, Any, float]]:
        """Each reply that counts, and how much; `own`: what the method gives a reply of that kind."""
        counts: dict[int, tuple[float, int | None]] = {}  # how much each would count, and its examples
        if not self.keeps_all:
            for client, up in replies:
                counts[client] = self._count(client, up, own), getattr(up, "examples", None)
                yield client, up, counts[client][0]
                del up  # large ones are gone before the next one comes
            total = sum(count for count, _ in counts.values())
            why = self._reasons(counts)
            self.shares = {client: Share(count / total, why[client]) for client, (count, _) in counts.items()}
            return
        held = list(replies)
        counts = {client: (self._count(client, up, own), getattr(up, "examples", None)) for client, up in held}
        losses = np.array([getattr(up, "loss", math.nan) for _, up in held], np.float64)
        self.shares = self._within_bounds(counts, losses) if held else {}
        held.reverse()
        while held:
            client, up = held.pop()
            if self.shares[client].share > 0:
                yield client, up, self.shares[client].share
            del up

    def leave_out(self, clients: Iterable[int]) -> None:
        """These had a share, and are not in the result after all: it goes to the others, in proportion."""
        aside = {*clients} & {*self.shares}
        rest = sum(found.share for client, found in self.shares.items() if client not in aside)
        for client, found in self.shares.items():
            self.shares[client] = Share(0.0 if client in aside or not rest else found.share / rest, found.why)

    def _count(self, client: int, up: Any, own: Callable[[Any], float]) -> float:
        agreed = self.agreement
        if agreed is None:
            return own(up)
        if agreed.table is not None:
            count: float = agreed.table[self.names[client]]
        else:
            count = own(up) if agreed.by == "method" else up.examples if agreed.by == "examples" else 1
        return count if client not in self.late else count * agreed.stale ** self.late[client]

    def _reasons(self, counts: Mapping[int, tuple[float, int | None]]) -> dict[int, str]:
        fresh = [found for client, found in counts.items() if client not in self.late] or [*counts.values()]
        if self.agreement is not None and self.agreement.by != "method":
            why = "equally" if self.agreement.by == "equal" else f"by {self.agreement.by}"
        elif all(count == examples for count, examples in fresh):
            why = "by examples"
        else:
            why = "equally" if len({count for count, _ in fresh}) == 1 else "as the method has it"
        return {client: why + (f", late by {self.late[client]}" if client in self.late else "") for client in counts}

    def _within_bounds(self, counts: Mapping[int, tuple[float, int | None]], losses: Shares) -> dict[int, Share]:
        assert self.agreement is not None
        agreed, found = self.agreement, np.array([count for count, _ in counts.values()], np.float64)
        # fewer replies than the bounds were made for: they count alike then
        floor, cap = min(agreed.floor, 1 / found.size), max(agreed.cap, 1 / found.size)
        first = found / found.sum()
        second = bounded(first, floor, cap)
        last = leaning(second, losses, agreed.fair, floor, cap)
        why = self._reasons(counts)
        for client, p, q, end, loss in zip(counts, first, second, last, losses, strict=True):
            if abs(q - p) > NEAR:
                edge = {cap: ", capped", floor: ", raised to the floor"}.get(float(q), ", moved as others were bounded")
                why[client] += f"{edge} from {p:.4g}"
            if abs(end - q) > NEAR:
                why[client] += f", leant from {q:.4g} by a loss of {loss:.4g}"
        return {client: Share(float(end), why[client]) for client, end in zip(counts, last, strict=True)}


def bounded(shares: Shares, floor: float, cap: float) -> Shares:
    """clip(t shares, floor, cap) with t such that they sum to 1. shares: above 0; floor <= 1 / their number <= cap."""
    edges = np.unique(np.concatenate([[0.0], floor / shares, cap / shares]))
    sums = np.array([np.clip(t * shares, floor, cap).sum() for t in edges])  # rises piece by piece of a line
    found: Shares = np.clip(np.interp(1.0, sums, edges) * shares, floor, cap)
    return found


def leaning(shares: Shares, losses: Shares, distance: float, floor: float = 0.0, cap: float = 1.0) -> Shares:
    """The shares, each within a distance of `shares` and in floor..cap, that maximise sum share * loss.

    Among equal losses what is left goes in proportion to the room of each. A loss that is not finite leaves its share
    as it is.
    """
    known = np.isfinite(losses)
    low = np.where(known, np.maximum(shares - distance, floor), shares)
    room = np.where(known, np.minimum(shares + distance, cap), shares) - low
    found, left = low.copy(), 1 - low.sum()
    for loss in np.unique(losses[known])[::-1]:
        at = losses == loss
        if (most := room[at].sum()) > 0:
            taken = min(max(left, 0.0), most)
            found[at] += room[at] * (taken / most)
            left -= taken
    return found
