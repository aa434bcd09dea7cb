"""Ways to combine updates that a few clients cannot sway, and a gate before them.

u_i is what client i's update changes, n the clients of a round, f those that may be hostile:

    clipped   u_i <- u_i min(1, c / |u_i|), then as `then` combines them; c is a bound, or the median of all |u_i|, or
              the median of the last ROUNDS rounds' medians, this one's among them
    median    of each number the middle one, or the mean of the two in the middle
    trimmed   of each number the mean without the k lowest and the k highest, k = ceil(share n)
    krum      the mean of the `keep` with the lowest s_i = sum of the n - f - 2 least |u_i - u_j|^2
    vote      of each number sign(sum_i sign(u_i)) times `scale`: a number, or the median of all |u_i|
    gated     those by which alone the loss on the server's rows rises by no more than a bound, then as `then` says

Norms: Sun et al. 2019, arXiv:1911.07963. Median and trimmed mean: Yin et al. 2018, arXiv:1803.01498. Krum: Blanchard et
al. 2017, arXiv:1703.02757; with `keep` above 1 their multi-Krum. Votes: Bernstein et al. 2018, arXiv:1810.05291. A
client counts once, whatever it claims, but in the means after a bound and a gate and of those that Krum has kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from thinwire.aggregate import columns
from thinwire.aggregate.air import Air
from thinwire.aggregate.mean import LENGTH, Aggregation, Mean, Metrics, Reports, Setting, Update
from thinwire.errors import ConfigError

ROUNDS = 10  # whose lengths are in a running median
Updates = Iterable[tuple[int, Update]]
Block = NDArray[Any]  # float32 or float64, [clients, numbers]
Result = tuple[dict[str, Tensor], Metrics]


def mean_without(block: Block, cut: int) -> Block:
    """[numbers]: of each number the mean without the `cut` lowest and highest. The block is then sorted."""
    block.sort(axis=0)
    kept = block[cut : block.shape[0] - cut]
    found: Block = kept[0] if len(kept) == 1 else kept.mean(axis=0, dtype=np.float64)
    return found


def middle(block: Block) -> Block:
    """[numbers]: of each number the median. The block is then sorted."""
    return mean_without(block, (block.shape[0] - 1) // 2)


class _EachNumber(Aggregation):
    """A rule for each number apart, of all clients that hold it."""

    @property
    def keeps_all(self) -> bool:
        return True

    def __call__(self, updates: Updates, at: Setting | None = None) -> Result:
        reports, held = Reports(), []
        for _, update in updates:
            reports.add(update)
            held.append(update.tensors)
        found = columns.combined(held, self.rule, at.spool if at is not None else None)
        return found, reports.metrics if found else {}

    def rule(self, block: Block) -> Block:
        """[clients, numbers] to [numbers]; it may write to the block."""
        raise NotImplementedError


class Median(_EachNumber):
    """Of each number the median: holds while fewer than half of the clients are hostile."""

    kind: Literal["median"] = "median"

    def rule(self, block: Block) -> Block:
        return middle(block)


class Trimmed(_EachNumber):
    """Of each number the mean without the share of the lowest and of the highest, rounded up to whole clients."""

    kind: Literal["trimmed"] = "trimmed"
    share: float = Field(0.2, ge=0, lt=0.5)  # at each end: as many as may be hostile

    def cut(self, clients: int) -> int:
        """The clients that are cut at each end, of so many."""
        return math.ceil(self.share * clients - 1e-9)

    def check_cohort(self, clients: int) -> None:
        if clients - 2 * self.cut(clients) < 1:
            cut = f"share {self.share:g} of a round's {clients} clients, cut at each end, leaves nobody"
            raise ConfigError(f"method.aggregation: {cut}")

    def rule(self, block: Block) -> Block:
        clients = block.shape[0]  # where some have not replied, the median is the most that can be cut
        return mean_without(block, min(self.cut(clients), (clients - 1) // 2))


class Vote(_EachNumber):
    """Of each number the sign that most have, of codes of one bit: each client has one vote, and none a length."""

    kind: Literal["vote"] = "vote"
    scale: PositiveFloat | Literal["median"] = "median"  # how far each number moves; median: of the clients' scales

    def rule(self, block: Block) -> Block:
        signs = np.sign(np.sign(block).sum(axis=0, dtype=np.float64))
        scale = middle(np.abs(block)) if self.scale == "median" else self.scale
        found: Block = (signs * scale).astype(block.dtype)
        return found


class Krum(Aggregation):
    """The mean of the updates that have the nearest neighbours; the others are left out."""

    kind: Literal["krum"] = "krum"
    attackers: PositiveInt = 1  # f, that may be hostile: a round needs 2 f + 3 clients
    keep: PositiveInt = 1  # of the updates; above 1 it is multi-Krum

    @property
    def keeps_all(self) -> bool:
        return True

    @property
    def needs(self) -> int:
        """The clients that it needs."""
        return max(2 * self.attackers + 3, self.attackers + self.keep)

    def check_cohort(self, clients: int) -> None:
        if clients < self.needs:
            asked = f"krum against {self.attackers} that keeps {self.keep} needs {self.needs} clients in a round"
            raise ConfigError(f"method.aggregation: {asked}, and there are {clients}")

    def __call__(self, updates: Updates, at: Setting | None = None) -> Result:
        at, held = at or Setting(), list(updates)
        if len(held) < self.needs:
            why = f"krum against {self.attackers} needs {self.needs} replies, and there are {len(held)}"
            at.left_out.update(dict.fromkeys((client for client, _ in held), why))
            return {}, {}
        apart = columns.squared_distances([update.tensors for _, update in held], at.origin, at.spool)
        np.fill_diagonal(apart, np.inf)
        scores = np.sort(apart, axis=1)[:, : len(held) - self.attackers - 2].sum(axis=1)
        order = np.argsort(scores, kind="stable")
        chosen, last = sorted(order[: self.keep]), scores[order[self.keep - 1]]
        for i in order[self.keep :]:
            at.left_out[held[i][0]] = f"krum: {scores[i]:.3g} from its neighbours, those kept {last:.3g} at most"
        return Mean()(held[i] for i in chosen)


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyRule: TypeAlias = Annotated[
    Annotated[Mean | Median | Trimmed | Krum | Vote | Air, Field(discriminator="kind")], BeforeValidator(_named)
]


class Clipped(Aggregation):
    """Updates of no more than a length, combined in another way; by default their weighted mean."""

    kind: Literal["clipped"] = "clipped"
    bound: PositiveFloat | Literal["median", "running"] = "median"  # of a length; of the round's, of the last ones'
    then: AnyRule = Mean()

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind, *self.then.kinds)

    @property
    def keeps_all(self) -> bool:
        return isinstance(self.bound, str) or self.then.keeps_all

    def check_cohort(self, clients: int) -> None:
        self.then.check_cohort(clients)

    def __call__(self, updates: Updates, at: Setting | None = None) -> Result:
        at, clipped, known = at or Setting(), 0, dict[str, float]()
        measured: Iterable[tuple[int, Update, float]] = (
            (client, update, columns.norm(update.tensors, at.origin)) for client, update in updates
        )
        if isinstance(self.bound, str):
            measured = held = list(measured)
            bound = float(np.median([length for *_, length in held])) if held else 0.0
            if self.bound == "running":
                known = {LENGTH: bound}
                bound = float(np.median([*at.lengths, bound][-ROUNDS:]))
        else:
            bound = self.bound

        def within() -> Iterator[tuple[int, Update]]:
            nonlocal clipped
            for client, update, length in measured:
                if length > bound:
                    clipped += 1
                    update = update._replace(tensors=columns.shortened(update.tensors, at.origin, bound / length))
                yield client, update

        found, metrics = self.then(within(), at)
        return found, metrics | {"clipped": clipped, "bound": bound} | known if found else {}


AnyUngated: TypeAlias = Annotated[
    Annotated[Mean | Clipped | Median | Trimmed | Krum | Vote | Air, Field(discriminator="kind")],
    BeforeValidator(_named),
]


class Gated(Aggregation):
    """The updates that do no harm on the server's rows, each tried alone, combined in another way."""

    kind: Literal["gated"] = "gated"
    bound: NonNegativeFloat = 0.1  # nats that the loss on data.public may rise by
    then: AnyUngated = Mean()

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind, *self.then.kinds)

    @property
    def keeps_all(self) -> bool:
        return True  # tried between visits, each would cost the clients' net what it holds

    def check_cohort(self, clients: int) -> None:
        self.then.check_cohort(clients)

    def __call__(self, updates: Updates, at: Setting | None = None) -> Result:
        if at is None or at.rise is None:  # an estimate's server has no rows; a run without them is refused
            return self.then(updates, at)
        kept = []
        for client, update in list(updates):
            rise = at.rise(client, update)
            if rise <= self.bound:
                kept.append((client, update))
            else:
                at.left_out[client] = f"the loss on data.public rises by {rise:.3g}, more than {self.bound:g}"
        return self.then(iter(kept), at)


AnyAggregation: TypeAlias = Annotated[
    Annotated[Mean | Clipped | Median | Trimmed | Krum | Vote | Gated | Air, Field(discriminator="kind")],
    BeforeValidator(_named),
]
"""Of a run file: a table known by its `kind`, or the kind alone."""
