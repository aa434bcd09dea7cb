"""The run: rounds, evaluations, checkpoints and records, in a folder that a later process can go on with."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinwire import memory
from thinwire.core import Client, Method, Metrics, Round, Server, Transport, Visit, run_round
from thinwire.keys import Key
from thinwire.runtime import checkpoint
from thinwire.runtime.checkpoint import Progress
from thinwire.runtime.cohort import Segment, cohort_of
from thinwire.runtime.inprocess import InProcess
from thinwire.runtime.store import ClientMemories, ClientMemory, VersionStore

if TYPE_CHECKING:
    from thinwire.data.batch import Dataset
    from thinwire.model.flat import Net

Record = dict[str, Any]


class Watch:
    """Told of a run as it goes on; this one does nothing."""

    def round_begins(self, round: int, rounds: int, cohort: Sequence[int]) -> None:
        """A round begins with these clients."""

    def client_done(self, client: int) -> None:
        """A client of the round has answered."""

    def round_ends(self, record: Record, left: float) -> None:
        """The line that rounds.jsonl gets, and an estimate of the seconds left."""

    def evaluated(self, record: Record) -> None:
        """A line that evals.jsonl gets."""


@dataclass
class Job:
    """A run, assembled: what it trains, on whom, how long, and where it keeps its records.

    `transport` leads to clients elsewhere, for whom `clients` is empty; without it they live in this process. `survey`
    asks those clients to score a state: the records that it returns go to evals.jsonl too.
    """

    method: Method
    net: Net
    clients: Sequence[Dataset]
    names: Sequence[str]
    folder: Path
    run: int  # an id that frames carry
    key: Key
    rounds: int
    segments: Sequence[Segment]
    evaluate: Callable[[], list[Record]]  # scores the weights in the net
    eval_every: int = 0  # 0: before the first and after the last round only
    public: Dataset | None = None
    keep_versions: int = 8
    max_bytes: int = 1 << 38
    memory_before_model: int = 0  # bytes resident after the imports
    watch: Watch = field(default_factory=Watch)
    card: Callable[[Record], str] | None = None  # what the model's README.md says of a run with that summary
    transport: Transport | None = None
    survey: Callable[[Any, Server, dict[int, str]], list[Record]] | None = None


def train(job: Job) -> Record:
    """Run or go on with the job; returns the summary, which is also summary.json. `model/` then holds the weights.

    The checkpoint of a round is written after its records: a resumed run drops the records beyond its checkpoint.
    """
    spool = job.folder / "spool"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir(parents=True)
    states = job.folder / "state"
    clients = range(len(job.names))
    versions = VersionStore(states / "versions", job.keep_versions)
    memories = ClientMemories(states / "clients")

    def server(round: int, cohort: Sequence[int] = ()) -> Server:
        key = job.key.fold("server", round)
        return Server(job.net, key, round, job.rounds, tuple(cohort), versions, job.public)

    def client(id: int, round: int) -> Client:
        key = job.key.fold("client", id, "round", round)
        return Client(id, job.net, job.clients[id], key, memories.of(id, round), versions, held.get(id))

    def done(client: Client) -> None:
        assert isinstance(client.memory, ClientMemory)
        client.memory.commit()
        job.watch.client_done(client.id)

    def score(round: int) -> None:
        job.method.materialise(state, job.net)
        rows = job.evaluate()
        if job.survey is not None:
            rows = rows + job.survey(state, server(round, clients), held)
        for row in rows:
            record = {"round": round, **row}
            _append(job.folder / "evals.jsonl", record)
            job.watch.evaluated(record)

    def save(finished: bool = False) -> Progress:
        nonlocal state
        peak = max(progress.peak_memory_bytes, memory.peak() - job.memory_before_model)
        seconds = progress.seconds + time.perf_counter() - clock
        names = {str(id): version for id, version in held.items()}
        now = Progress(round, names, bytes_down, bytes_up, seconds, peak, finished)
        checkpoint.write(states, state, now)
        if job.transport is not None:  # clients elsewhere work on nets of their own, and long: no model lies idle here
            state = checkpoint.on_disk(states, round, job.method.State)
            job.net.rest()
            memory.trim()
        return now

    memory.reset()
    clock = time.perf_counter()
    found = checkpoint.read(states, job.method.State)
    if found is None:
        progress = Progress(0, {}, 0, 0, 0.0, 0)
        state = job.method.init(server(0))
    else:
        state, progress = found
    round, bytes_down, bytes_up = progress.round, progress.bytes_down, progress.bytes_up
    held = {int(id): version for id, version in progress.held.items()}
    memories.rewind(round)
    _drop_after(job.folder / "rounds.jsonl", round)
    _drop_after(job.folder / "evals.jsonl", round if found else -1)
    if found is None:
        score(0)
        progress, clock = save(), time.perf_counter()

    began, first = time.perf_counter(), round
    transport = job.transport or InProcess(job.method, client, done, spool)
    while round < job.rounds:
        round += 1
        cohort = cohort_of(job.segments, clients, round, job.key.fold("cohort", round))
        job.watch.round_begins(round, job.rounds, cohort)
        started = time.perf_counter()
        at = Round(job.run, server(round, cohort), transport, held, spool, job.max_bytes)
        state, metrics = run_round(job.method, state, at)
        bytes_down, bytes_up = bytes_down + at.ledger.bytes_down, bytes_up + at.ledger.bytes_up
        record = _record(job, at, metrics, time.perf_counter() - started)
        _append(job.folder / "rounds.jsonl", record)
        job.watch.round_ends(record, (time.perf_counter() - began) / (round - first) * (job.rounds - round))
        if round == job.rounds or (job.eval_every and round % job.eval_every == 0):
            score(round)
        progress, clock = save(finished=round == job.rounds), time.perf_counter()
        memories.prune(checkpoint.rounds(states)[0])

    job.method.materialise(state, job.net)
    summary = _summary(job, progress)
    job.net.save(job.folder / "model", job.card(summary) if job.card is not None else None)
    shutil.rmtree(spool)
    partial = job.folder / "summary.json.part"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    partial.replace(job.folder / "summary.json")
    return summary


def _record(job: Job, at: Round, metrics: Metrics, seconds: float) -> Record:
    return {
        "round": at.server.round,
        "clients": [_client(visit, job.names) for visit in at.visits.values()],
        "bytes_down": at.ledger.bytes_down,
        "bytes_up": at.ledger.bytes_up,
        "seconds": seconds,
        "peak_memory_bytes": memory.peak() - job.memory_before_model,
        "metrics": metrics,
    }


def _client(visit: Visit, names: Sequence[str]) -> Record:
    record = {"id": visit.client, "name": names[visit.client], **asdict(visit)}
    del record["client"]
    if record["loss"] is not None and not math.isfinite(record["loss"]):
        record["loss"] = None  # no step was taken; JSON has no NaN
    if record["error"] is None:
        del record["error"]
    return record


def _summary(job: Job, progress: Progress) -> Record:
    evals = read_records(job.folder / "evals.jsonl")
    return {
        "rounds": progress.round,
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "seconds": progress.seconds,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "parameters": job.net.size,
        "model_bytes": job.net.nbytes,
        "first": [row for row in evals if row["round"] == 0],
        "final": [row for row in evals if row["round"] == progress.round],
        "sha256": job.net.state_sha256(),
    }


def read_records(path: Path) -> list[Record]:
    """The lines of a .jsonl file; a last one that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _append(path: Path, record: Record) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_after(path: Path, round: int) -> None:
    kept = [record for record in read_records(path) if record["round"] <= round]
    partial = path.with_suffix(".part")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    partial.replace(path)
