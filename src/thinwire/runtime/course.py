"""The run: rounds, evaluations, checkpoints and records, in a folder that a later process can go on with."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thinwire import memory, records
from thinwire.core import Method, Metrics, Server
from thinwire.errors import RunError
from thinwire.keys import Key
from thinwire.records import Record, read_records
from thinwire.runtime import checkpoint
from thinwire.runtime.checkpoint import Progress
from thinwire.runtime.cohort import Segment, check_clients
from thinwire.runtime.endpoint import ACTIONS, Action, Endpoint
from thinwire.runtime.inprocess import InProcess
from thinwire.runtime.round import LOG, Round, RoundFunction, Transport, Visit, run_round
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import ClientMemories, VersionStore
from thinwire.wire.frame import MAX_FRAME, header_room

if TYPE_CHECKING:
    from thinwire.data.batch import Dataset
    from thinwire.model.net import Net

LOGFILE = "log.txt"


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

    def noticed(self, line: str) -> None:
        """What people must know of a run that goes on, such as records that are lost; the log has it too."""


@dataclass
class Job:
    """A run, assembled: what it trains, on whom, how long, and where it keeps its records.

    `transport` leads to clients elsewhere, for whom `clients` is empty; without it they live in this process. `survey`
    asks those clients to score a state: the records that it returns go to evals.jsonl too. `caps`: client -> the most
    examples that it may claim; of clients in this process their rows.
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
    max_bytes: int = MAX_FRAME  # of a reply
    caps: Mapping[int, int] = field(default_factory=dict)
    memory_before_model: int = 0  # bytes resident after the imports
    watch: Watch = field(default_factory=Watch)
    card: Callable[[Record], str] | None = None  # what the model's README.md says of a run with that summary
    transport: Transport | None = None
    round: RoundFunction = run_round
    actions: Mapping[str, Action] = field(default_factory=dict)
    survey: Callable[[Any, Server, dict[int, str]], list[Record]] | None = None


def train(job: Job) -> Record:
    """Run or go on with the job; returns the summary, which is also summary.json. `model/` then holds the weights.

    The checkpoint of a round is written after its records: a resumed run drops the records beyond its checkpoint.
    ConfigError: a cohort of clients that are not there. RunError: the weights or the last loss are not finite, and
    there is no model; the checkpoint before them stays. Damaged: no checkpoint can be read; nothing is changed then.
    """
    with _log(job.folder):
        return _train(job)


def _train(job: Job) -> Record:
    clients = range(len(job.names))
    check_clients(job.segments, len(clients))
    states = job.folder / "state"
    caps = job.caps or {id: len(data) for id, data in enumerate(job.clients)}
    header = header_room(job.method.Up, job.net.names)
    versions = VersionStore(states / "versions", job.keep_versions, late=True)
    memories = ClientMemories(states / "clients")

    held: dict[int, str] = {}
    parts = (job.net, versions, job.clients, memories, lambda client, _: held.get(client), job.public)
    seats = Seats(job.key, job.rounds, *parts)

    def score(round: int) -> list[Record]:
        """Evaluate; what this process itself has measured."""
        nonlocal evals
        job.method.materialise(state, job.net)
        own = job.evaluate()
        for row in own + (job.survey(state, seats.server(round, clients), held) if job.survey is not None else []):
            record = {"round": round, **row}
            records.append(job.folder / "evals.jsonl", record)
            evals += 1
            job.watch.evaluated(record)
        return own

    def save(finished: bool = False) -> Progress:
        nonlocal state
        peak = max(progress.peak_memory_bytes, memory.peak() - job.memory_before_model)
        seconds = progress.seconds + time.perf_counter() - clock
        names = {str(id): version for id, version in held.items()}
        newest = {str(id): written for id, written in memories.newest.items()}
        now = Progress(round, names, bytes_down, bytes_up, seconds, peak, finished, newest, evals, versions.kept())
        checkpoint.write(states, state, now)
        versions.trim()
        if job.transport is not None:  # clients elsewhere work on nets of their own, and long: no model lies idle here
            state = checkpoint.on_disk(states, round, job.method.State)
            job.net.rest()
            memory.trim()
        return now

    memory.reset()
    clock = time.perf_counter()
    notes: list[str] = []
    found = checkpoint.read(states, job.method.State, lambda kept: memories.check(kept.memory or {}))
    if found is None:
        if read_records(job.folder / "rounds.jsonl"):
            raise RunError(
                f"{states}: there is no checkpoint, but rounds.jsonl has rounds that have ended; nothing was changed: "
                "put the folder back from a copy, or begin anew with another --out"
            )
        progress = Progress(0, {}, 0, 0, 0.0, 0)
        state = job.method.init(seats.server(0))
    else:
        state, progress = found.state, found.progress
        notes += [f"the checkpoint of {reason}; going on from round {progress.round}" for reason in found.passed]
    spool = _cleared(job.folder)
    round, bytes_down, bytes_up = progress.round, progress.bytes_down, progress.bytes_up
    held.update({int(id): version for id, version in progress.held.items()})
    memories.rewind(round)
    if progress.versions is not None:
        versions.rewind(progress.versions)
    notes += records.rewind(job.folder / "rounds.jsonl", round, round)
    notes += records.rewind(job.folder / "evals.jsonl", round if found else -1, progress.evals)
    for note in notes:
        LOG.warning(note)
        job.watch.noticed(note)
    evals = len(read_records(job.folder / "evals.jsonl"))
    examples = _examples(read_records(job.folder / "rounds.jsonl"))
    if found is None:
        score(0)
        progress, clock = save(), time.perf_counter()

    began, first = time.perf_counter(), round
    done = lambda client: job.watch.client_done(client.id)  # noqa: E731
    endpoint = Endpoint(job.method, seats, {**ACTIONS, **job.actions}, done, spool)
    transport = job.transport or InProcess(endpoint)
    while round < job.rounds:
        round += 1
        cohort = seats.cohort(job.segments, len(clients), round)
        job.watch.round_begins(round, job.rounds, cohort)
        started = time.perf_counter()
        at = Round(job.run, seats.server(round, cohort), transport, held, spool, job.max_bytes, header, caps, examples)
        state, metrics = job.round(job.method, state, at)
        bytes_down, bytes_up = bytes_down + at.ledger.bytes_down, bytes_up + at.ledger.bytes_up
        record = _record(job, at, metrics, time.perf_counter() - started)
        _check_finite(state, round)
        records.append(job.folder / "rounds.jsonl", record)
        job.watch.round_ends(record, (time.perf_counter() - began) / (round - first) * (job.rounds - round))
        if round == job.rounds or (job.eval_every and round % job.eval_every == 0):
            scored = score(round)
            if round == job.rounds:
                _check_scores(scored, round)
        progress, clock = save(finished=round == job.rounds), time.perf_counter()
        memories.prune(checkpoint.rounds(states)[0])

    job.method.materialise(state, job.net)
    summary = _summary(job, progress)
    job.net.save(job.folder / "model", job.card(summary) if job.card is not None else None)
    shutil.rmtree(spool)
    records.replace(job.folder / "summary.json", (records.dumps(summary, indent=2) + "\n").encode())
    return summary


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[None]:
    """What went wrong on the way, with its traceback, goes to log.txt of the run's folder."""
    handler = logging.FileHandler(folder / LOGFILE, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    passed_on, LOG.propagate = LOG.propagate, False
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.propagate = passed_on
        handler.close()


def _cleared(folder: Path) -> Path:
    """The empty folder for large frames; what a process that was killed has left half-written is gone."""
    spool = folder / "spool"
    left = [spool, *folder.glob(".model.*.tmp"), *folder.glob(".model.*.old"), *(folder / "state").glob("*.part")]
    for place in left:
        shutil.rmtree(place, ignore_errors=True)
    for pattern in (".tmp*", "*.part", "*.tmp"):
        for file in (folder / "state").rglob(pattern):
            file.unlink(missing_ok=True)
    spool.mkdir(parents=True)
    return spool


def _examples(rounds: Sequence[Record]) -> dict[int, int]:
    """Client -> the examples of its first reply that counted."""
    first: dict[int, int] = {}
    for record in rounds:
        for visit in record["clients"]:
            if visit.get("examples") is not None:
                first.setdefault(visit["id"], visit["examples"])
    return first


def _check_finite(state: Any, round: int) -> None:
    """RunError names a tensor of the state that is not finite."""
    for at in fields(state):
        value = getattr(state, at.name)
        tensors = value.items() if isinstance(value, Mapping) else [(at.name, value)]
        for name, tensor in tensors:
            if isinstance(tensor, torch.Tensor) and not _finite(tensor):
                raise RunError(
                    f"after round {round} {name} is not finite: the rate is too high, or a client has sent what is "
                    f"legal and wrong; no model is saved, and the checkpoint of round {round - 1} stays"
                )


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))  # no copy of it is made


def _check_scores(own: Sequence[Record], round: int) -> None:
    for row in own:
        loss = row.get("loss", 0.0)
        if loss is None or not math.isfinite(loss):
            raise RunError(
                f"after the last round, {round}, the loss on {row['split']} is not finite; no model is saved, and the "
                f"checkpoint of round {round - 1} stays"
            )


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
