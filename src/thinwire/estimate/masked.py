"""Bytes of a round under masks before it runs: a method's frames as its clients get them, its sums as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from thinwire.assemble.privacy import budget_of
from thinwire.config import Run
from thinwire.core import Averaged
from thinwire.costs.frames import VERSION, Expected, Frames, Span
from thinwire.privacy.secure import Secure
from thinwire.runtime.payloads import Masked, Task

ATTEMPT = bytes(16)


class _Shapes:
    """Of a net what sums are planned by."""

    def __init__(self, trained: Any) -> None:
        self.trained, self.size = trained, sum(tensor.numel() for tensor in trained.values())

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.trained.items()


def masked(run: Run, at: Expected, frames: Frames, secure: Secure) -> Frames:
    """The frames of a run's secure sums; key material is apart, as in the records."""
    from thinwire.runtime.sums import Plan  # what it needs comes with an extra

    method = run.method
    assert isinstance(method, Averaged)
    budget = budget_of(run, {}, len(at.examples)) if run.privacy is not None and run.privacy.level == "client" else None
    whole = None if budget is None else budget.protection
    net = _Shapes(at.trained)
    sizes: dict[int, tuple[int, int]] = {}  # of a cohort: the bytes of its sums, of what its broadcast has beside

    def of(clients: int) -> tuple[int, int]:
        if clients not in sizes:
            plan = Plan.of(method, net, secure, clients, whole)
            sizes[clients] = plan.sums.nbytes, plan.linear.extra_bytes(net)
        return sizes[clients]

    def nothing(size: float) -> Tensor:
        return torch.empty(int(size), dtype=torch.uint8, device="meta")

    def under(round: int, client: int, new: bool) -> tuple[Span, Span]:
        cohort = at.cohorts[round - 1]
        numbers, beside = of(len(cohort))
        near = [peer for peer in cohort if peer != client][: secure.neighbours]
        # scales that all have in common come of the first round, in which nothing moves
        down, _ = frames(1, client, True) if beside and round == 2 else frames(round, client, new)
        ends = [at.length(Task(ATTEMPT, near, nothing(size)), round, client) for size in (down.least, down.most)]
        ups = [at.length(Masked(nothing(numbers)), round, client, held) for held in (None, VERSION)]
        few = 0 if secure.neighbours is None else 4 * len(near)  # digits of who stands beside it
        return Span(ends[0] - few, ends[1] + few + beside), Span(*ups)

    return under
