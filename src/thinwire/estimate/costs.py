"""The estimate of a run: bytes, memory, operations and the time that its bytes take on a link."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from thinwire import build
from thinwire.build import Rows
from thinwire.config import ConfigError, Run, method_name
from thinwire.data.bundled import PACKAGED
from thinwire.data.classes import classes_of
from thinwire.data.errors import DataError
from thinwire.estimate.memory import Memory, client_memory, server_memory
from thinwire.estimate.sketch import one_pass, sketch
from thinwire.estimate.traffic import Federation, Traffic, traffic
from thinwire.keys import Key
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedzo import FedZO
from thinwire.runtime.cohort import check_clients

LINKS = (1, 10, 100)  # Mbit/s
READ = 1 << 26  # bytes of rows that are read to count them; more are not worth the time
ANSWER = 32  # tokens of an answer, where nothing says how long answers are


@dataclass(frozen=True)
class Estimate:
    """What a run will cost. Bytes a visit and in all; peak memory of either side; operations a visit.

    `assumed` says what was taken for granted. None where nothing is known of a user's own method.
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
    flops: float  # of a client's visit; NaN where the method does not say how many passes it makes
    assumed: list[str]

    def link_seconds(self, megabits: float) -> tuple[float, float] | None:
        """From the least to the most seconds that a returning client's two frames take on a link."""
        if self.traffic is None:
            return None
        down, up = self.traffic.returning
        return tuple(8 * count / (megabits * 1e6) for count in (down.least + up.least, down.most + up.most))  # type: ignore[return-value]

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
        check_clients(run.cohort, len(examples))
    model = sketch(run, partial(classes_in, run, held, assumed))
    method = run.method
    rows = int(getattr(method, "batch_size", 1))
    length = run.data.max_length
    assumed.append(f"batches of {rows} rows of {length} tokens, the most that data.max_length allows")
    sides = rows
    if isinstance(method, FedKSeed | FedZO) and method.together:
        sides *= 2 * method.queries
    closed = run.data.choices is not None and run.data.loss == "choice"
    if model.task == "classification":
        assumed.append("every text as long as that")
    elif closed:
        assumed.append("choices of one token each")
    else:
        assumed.append(f"answers of {min(ANSWER, length - 1)} tokens")
    probed = method_name(method) if isinstance(method, FedKSeed | FedZO) else None
    forward = one_pass(model, sides, length, 1 if closed else ANSWER, run.model.lora, probed)
    passes = method.passes() * run.model.view.forward_share
    return Estimate(
        method=method_name(method),
        model=run.model.path,
        parameters=model.weight_bytes // model.dtype.itemsize,
        trained=model.size,
        clients=len(examples),
        rounds=run.rounds,
        batch=(rows, length),
        traffic=traffic(Federation(run, build.identity(run), examples), model.trained),
        client=client_memory(run, model, forward),
        server=server_memory(run, model),
        flops=forward.flops / sides * passes,
        assumed=assumed,
    )


def rows_at_hand(run: Run) -> Rows | None:
    """The run's rows, or None where they are not here, are wrong, or are more than is worth the time."""
    data = run.data
    files = [] if data.path in PACKAGED else [Path(data.path)]
    files = [inner for file in files for inner in (file.rglob("*") if file.is_dir() else [file])]
    try:
        if sum(file.stat().st_size for file in files) <= READ and (files or data.path in PACKAGED):
            return build.rows_of(data, Key.root(run.seed))
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
    """How many classes a fresh head of a classifier would tell apart."""
    if run.data.choices is not None:
        return len(run.data.choices)
    if held is not None:
        rows = [row for rows in held.clients.values() for row in rows]
        try:
            return len(classes_of(build.in_words(run.data, rows), build.template_of(run.data, True)))
        except (DataError, ConfigError):
            pass
    assumed.append("two classes: neither data.choices nor the rows name them")
    return 2
