"""Bytes before a run: the frames of all visits, as the method expects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedConfig

from thinwire import assemble
from thinwire.assemble.secure import secure_of
from thinwire.config import Run
from thinwire.core import Server
from thinwire.costs.frames import Expected, Span
from thinwire.estimate.masked import masked
from thinwire.keys import Key
from thinwire.runtime.seats import Seats
from thinwire.versions import Versions


@dataclass(frozen=True)
class Traffic:
    """Of one visit of a newcomer and of one that returns, and of the run in all: bytes (down, up)."""

    newcomer: tuple[Span, Span]
    returning: tuple[Span, Span]
    total: tuple[Span, Span]
    visits: int


def expected(
    run: Run, examples: Sequence[int | None], trained: Mapping[str, Tensor], config: PreTrainedConfig
) -> Expected:
    """What is known of a run's frames before it; `examples`: of each client, None where the rows are not at hand.

    `config`: the model's.
    """
    seats = Seats(Key.root(run.seed), run.rounds)  # without a net: a half that asks it for anything cannot be run yet

    def server(round: int, cohort: Sequence[int], versions: Versions) -> Server:
        return replace(seats, versions=versions).server(round, cohort)

    cohorts = [seats.cohort(run.cohort, len(examples), round) for round in range(1, run.rounds + 1)]
    if run.privacy is not None and run.privacy.level is not None:
        examples = [1] * len(examples)  # all that a private reply says of them
    text, names = config.get_text_config(), ("word_embed_proj_dim", "embedding_size", "hidden_size")
    width = next((found for name in names if (found := getattr(text, name, None))), None)
    classes = config.num_labels if run.data.choices is None else len(run.data.choices)
    return Expected(trained, assemble.identity(run), examples, cohorts, server, width, classes)


def traffic(run: Run, at: Expected) -> Traffic | None:
    """What the run would send; None where its method does not know."""
    frames = run.method.frames(at)
    if frames is None:
        return None
    if (secure := secure_of(run)) is not None:
        frames = masked(run, at, frames, secure)
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


def verdict(estimated: Traffic, down: int, up: int) -> str:
    """Whether the bytes of a run that has ended are within what was estimated, and by how much they are not."""
    parts = []
    for name, span, count in (("down", estimated.total[0], down), ("up", estimated.total[1], up)):
        if span.holds(count):
            parts.append(f"{name} hit" + ("" if span.exact else f" (range 1 to {span.most / max(1, span.least):.1f})"))
        else:
            edge = span.least if count < span.least else span.most
            parts.append(f"{name} missed by {count / edge - 1:+.1%}")
    return f"bytes against the estimate: {', '.join(parts)}"
