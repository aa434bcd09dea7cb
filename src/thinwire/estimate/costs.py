"""The estimate of a run: bytes, memory, operations and the time that its bytes take on a link."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from thinwire import assemble
from thinwire.assemble import Rows
from thinwire.assemble.agreement import agreement_of, size_of
from thinwire.config import ConfigError, Run, method_name
from thinwire.costs.memory import Memory
from thinwire.data.bundled import PACKAGED
from thinwire.data.classes import classes_of
from thinwire.data.errors import DataError
from thinwire.estimate.sketch import one_pass, sketch
from thinwire.estimate.traffic import Traffic, expected, traffic
from thinwire.keys import Key
from thinwire.model.views.keep import kept

LINKS = (1, 10, 100)  # Mbit/s
READ = 1 << 26  # bytes of rows that are read to count them; more are not worth the time
ANSWER = 32  # tokens of an answer, where nothing is known of their length


@dataclass(frozen=True)
class Estimate:
    """What a run will cost. Bytes a visit and in all; peak memory of either side; operations a visit.

    `kept`: of replies that stay at the server until a round has ended, in files but for small ones; 0 where each is
    read as it comes. `assumed`: what was taken for granted. None where a method does not give it.
    """

    method: str
    model: str
    parameters: int
    trained: int
    clients: int
    rounds: int
    batch: tuple[int, int]  # rows, tokens a row
    traffic: Traffic | None
    client: Memory | None
    server: Memory | None
    kept: int | None
    flops: float  # of a client's visit, the rounds' mean; NaN where the method does not give how many passes it makes
    assumed: list[str]

    def link_seconds(self, megabits: float) -> tuple[float, float] | None:
        """From the least to the most seconds that a returning client's two frames take on a link."""
        if self.traffic is None:
            return None
        down, up = self.traffic.returning
        return 8 * (down.least + up.least) / (megabits * 1e6), 8 * (down.most + up.most) / (megabits * 1e6)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(self)
        for side in ("client", "server"):
            memory = getattr(self, side)
            if memory is not None:
                found[side]["total"] = memory.total
        found["flops"] = None if self.flops != self.flops else self.flops
        found["link_seconds"] = {str(link): self.link_seconds(link) for link in LINKS}
        return found


def estimate(run: Run) -> Estimate:
    """What the run will cost, from its file and its model's config; raises ModelError, ConfigError."""
    assumed: list[str] = []
    held = rows_at_hand(run)
    examples = examples_of(run, held, assumed)
    if held is not None:
        assemble.check_clients(run, len(examples))
    model = sketch(run, partial(classes_in, run, held, assumed))
    stays = kept(model.trained, run.model.view.keep)
    shared = replace(model, trained={name: t for name, t in model.trained.items() if name not in stays})
    method, length, most = run.method, run.data.max_length, "data.max_length allows"
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(places, int) and 0 < places - run.model.view.front < length:
        length, most = places - run.model.view.front, "the model has positions for"
    work = method.work(1)
    assumed.append(f"batches of {work.batch} rows of {length} tokens, the most that {most}")
    answers = _rows_of_one(run, held)
    at_once = answers * work.batch * work.sides
    closed = run.data.choices is not None and run.data.loss == "choice"
    if model.task != "causal":
        assumed.append("every text as long as that")
    elif closed:
        assumed.append("choices of one token each")
    else:
        assumed.append(f"answers of {min(ANSWER, length - 1)} tokens")
    probed = method_name(method) if work.probes else None
    view, answer = run.model.view, 1 if closed else ANSWER
    forward = one_pass(model, at_once, length + view.front, answer, view.factors, probed)
    sent = traffic(run, expected(run, examples, shared.trained, model.config))
    passes = answers * fmean(method.work(round).rows for round in range(1, run.rounds + 1)) * view.forward_share
    return Estimate(
        method=method_name(method),
        model=run.model.path,
        parameters=model.weight_bytes // model.dtype.itemsize,
        trained=model.size,
        clients=len(examples),
        rounds=run.rounds,
        batch=(work.batch, length),
        traffic=sent,
        client=method.memory(model, forward, "client"),
        server=method.memory(shared, forward, "server"),
        kept=None if sent is None else kept_of(run, len(examples), sent),
        flops=forward.flops / at_once * passes,
        assumed=assumed,
    )


def _rows_of_one(run: Run, held: Rows | None) -> int:
    """How many rows of a batch an example takes."""
    if run.data.loss == "contrastive":
        rows = [] if held is None else [row for some in held.clients.values() for row in some]
        negative = run.data.rejected is not None or (run.data.prompt is None and any(r.has("negative") for r in rows))
        return 3 if negative else 2
    return 2 if run.data.loss == "dpo" else 1


def kept_of(run: Run, clients: int, sent: Traffic) -> int:
    """The most bytes of replies that the server reads only when a round has ended; 0 where it does not."""
    agreed = agreement_of(run)
    if not run.method.keeps_all and not (agreed is not None and agreed.bounded):
        return 0
    most = max(size_of(segment, clients) for segment in run.cohort)
    return int(most * max(up.most for _, up in (sent.newcomer, sent.returning)))


def rows_at_hand(run: Run) -> Rows | None:
    """The run's rows, or None where they are not here, are wrong, or are more than is worth the time."""
    data = run.data
    files = [] if data.path in PACKAGED else [Path(data.path)]
    files = [inner for file in files for inner in (file.rglob("*") if file.is_dir() else [file])]
    try:
        if sum(file.stat().st_size for file in files) <= READ and (files or data.path in PACKAGED):
            return assemble.rows_of(data, Key.root(run.seed))
    except (OSError, DataError, ConfigError):
        pass
    return None


def examples_of(run: Run, held: Rows | None, assumed: list[str]) -> list[int | None]:
    """How many examples each client would have; None, and a line in `assumed`, where the rows are not at hand."""
    if held is not None:
        if run.data.too_long == "drop":
            assumed.append("no row is too long")
        return [len(rows) for rows in held.clients.values()]
    count = 1 if run.data.pooled else run.data.clients
    assumed.append(f"{count} clients: the rows are not at hand to be counted")
    return [None] * count


def classes_in(run: Run, held: Rows | None, assumed: list[str]) -> int:
    """How many classes a fresh head of a classifier would distinguish."""
    if run.data.choices is not None:
        return len(run.data.choices)
    if held is not None:
        rows = [row for rows in held.clients.values() for row in rows]
        try:
            return len(classes_of(assemble.in_words(run.data, rows), assemble.template_of(run.data, True)))
        except (DataError, ConfigError):
            pass
    assumed.append("two classes: neither data.choices nor the rows name them")
    return 2
