"""The run: rounds, evaluations, checkpoints and records, in a folder that a later process can go on with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from thinwire import files, memory, records
from thinwire.aggregate.weights import Weighing
from thinwire.errors import ConfigError, Paused, RunError
from thinwire.records import SELECTION, Record, read_records
from thinwire.runtime import checkpoint
from thinwire.runtime.audit import Book, sha256
from thinwire.runtime.checkpoint import Progress
from thinwire.runtime.cohort import check_clients
from thinwire.runtime.cross import Cross
from thinwire.runtime.endpoint import ACTIONS, Endpoint
from thinwire.runtime.folder import clear, logged
from thinwire.runtime.inprocess import InProcess
from thinwire.runtime.job import Job as Job
from thinwire.runtime.job import Watch as Watch
from thinwire.runtime.late import late_of
from thinwire.runtime.membership import Membership
from thinwire.runtime.outcome import check_scores, check_state, first_examples, lengths_of, loss_on, record_of
from thinwire.runtime.replies import Replies
from thinwire.runtime.round import LOG, Round
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import ClientMemories, VersionStore
from thinwire.runtime.survey import Survey
from thinwire.wire.frame import header_room


def train(job: Job) -> Record:
    """Run or go on with the job; returns the summary, which is also summary.json. `model/` then holds the weights.

    The checkpoint of a round is written after its records: a resumed run drops the records beyond its checkpoint.
    ConfigError: a cohort of clients that are not there, or no loss to stop or keep by. RunError: the weights or the
    last loss are not finite, and there is no model; the checkpoint before them stays. Damaged: no checkpoint can be
    read; nothing is changed then. Paused: `job.leave` has asked for it.
    """
    with logged(job.folder):
        course = Course(job)
        course.begin()
        while not course.ended:
            if job.leave():
                raise Paused(f"asked to end, after round {course.progress.round} of {job.rounds}")
            course.round()
        return course.end()


class Course:
    """A run as it goes on: `begin`, then `round` until it has `ended`, then `end`. See train."""

    state: Any

    def __init__(self, job: Job) -> None:
        check_clients(job.segments, len(job.names))
        self.job = job
        self.states, self.spool = job.folder / "state", job.folder / "spool"
        self.rounds, self.evals = job.folder / "rounds.jsonl", job.folder / "evals.jsonl"
        self.versions = VersionStore(self.states / "versions", job.keep_versions, late=True)
        self.memories = ClientMemories(self.states / "clients")
        self.held: dict[int, str] = {}
        parts = (job.net, self.versions, job.clients, self.memories, lambda client, _: self.held.get(client))
        private = (job.budget.protected, job.budget.protection) if job.budget is not None else ({}, None)
        self.seats = Seats(job.key, job.rounds, *parts, job.public, len(job.names), job.loss, *private)
        actions = {**ACTIONS, **job.actions}
        endpoint = Endpoint(job.method, self.seats, actions, lambda each: job.watch.client_done(each.id), self.spool)
        self.transport = job.transport or InProcess(endpoint)
        self.survey = job.survey
        if self.survey is None and "evaluate" in job.actions:
            self.survey = Survey(self.transport, job.method, job.run, self.spool, job.names)
        self.header = header_room(job.method.Up, job.net.names)
        self.caps = job.caps if job.caps or not job.clients else {id: len(data) for id, data in enumerate(job.clients)}
        self.members = Membership(job, self.versions)
        self.progress = Progress(0, {}, 0, 0, 0.0, 0)
        self.kept: int | None = None  # the best round in the last checkpoint
        self.split: str | None = job.on  # the one by whose loss a round is the best
        self.loss: float | None = None  # of that split, now
        self.book: Book | None = None
        self.replies = Replies(job.folder / "replies")
        self.clock = self.began = time.perf_counter()
        self.first = 0  # the round after which this process began

    @property
    def ended(self) -> bool:
        """Whether there is no round left, or the run has been stopped."""
        may_stop = self.job.stop is not None or self.job.budget is not None
        return self.progress.round >= self.job.rounds or (may_stop and self.progress.finished)

    def begin(self) -> None:
        """Go to the last checkpoint, or make the first, with the start model's scores."""
        job = self.job
        memory.reset()
        self.clock = time.perf_counter()
        found = checkpoint.read(self.states, job.method.State, self._check)
        notes: list[str] = []
        if found is None:
            if read_records(self.rounds):
                raise RunError(
                    f"{self.states}: there is no checkpoint, but rounds.jsonl has rounds that have ended; nothing was "
                    "changed: put the folder back from a copy, or begin anew with another --out"
                )
            self.state = job.method.init(self.seats.server(0))
        else:
            self.state, self.progress = found.state, found.progress
            notes += [
                f"the checkpoint of {reason}; going on from round {self.progress.round}" for reason in found.passed
            ]
        round = self.first = self.progress.round
        self.kept = self.progress.best
        clear(job.folder)
        self.held.update({int(id): version for id, version in self.progress.held.items()})
        self.memories.rewind(round)
        if self.progress.versions is not None:
            self.versions.rewind(self.progress.versions)
        notes += records.rewind(self.rounds, round, round)
        notes += records.rewind(self.evals, round if found else -1, self.progress.evals)
        for note in notes:
            LOG.warning(note)
            job.watch.noticed(note)
        before = read_records(self.evals)
        self.scores, self.split = len(before), job.on or next((row.get("split") for row in before), None)
        recorded = read_records(self.rounds)
        self.examples, self.lengths = first_examples(recorded), lengths_of(recorded)
        if job.audit:
            self.book = Book(job.folder, job.signer)
            self.book.catch_up(recorded, round)
            weights = None if job.weights is None else job.weights.model_dump(mode="json")
            self.book.begin(round, run=job.run, clients=list(job.names), weights=weights)
        self._turn()
        if found is None:
            self.score()
            self.save()
        self.began = time.perf_counter()

    def round(self) -> None:
        """The next round, its records, and its checkpoint."""
        job, round = self.job, self.progress.round + 1
        self._turn()
        cohort = self.seats.cohort(job.segments, self.members.now, round)
        job.watch.round_begins(round, job.rounds, cohort)
        started = time.perf_counter()
        late = late_of(job, self.seats, self.transport, self.states, self.members, round)
        weighing = Weighing(job.weights, job.names, dict.fromkeys(late, 1))
        server = replace(self.seats.server(round, cohort), weighing=weighing, late=late, lengths=self.lengths)
        at = Round(job.run, server, self.transport, self.held, self.spool, job.max_bytes, self.header)
        at.caps, at.examples = self.caps, self.examples
        at.ledger.digest = sha256 if job.audit else None
        at.seen = partial(self._seen, round)
        if job.replies:
            self.replies.begin(round)
        self.state, metrics = job.round(job.method, self.state, at)
        up, down = self.progress.bytes_up + at.ledger.bytes_up, self.progress.bytes_down + at.ledger.bytes_down
        seconds, peak = time.perf_counter() - started, memory.peak() - job.memory_before_model
        if job.budget is not None:  # no reply has a loss, and a mean of none is none
            spent = job.budget.spent(round)
            metrics = {name: value for name, value in metrics.items() if name not in ("loss", "skipped")}
            metrics |= {} if spent is None else {"epsilon": spent}
        record = record_of(at, job.names, metrics, seconds, peak)
        self.lengths += lengths_of([record])
        check_state(self.state, round)
        keys = self.progress.bytes_keys + at.ledger.bytes_keys
        self.progress = replace(self.progress, round=round, bytes_up=up, bytes_down=down, bytes_keys=keys)
        records.append(self.rounds, record)
        mean = (time.perf_counter() - self.began) / (round - self.first)
        job.watch.round_ends(record, mean * (job.rounds - round))
        last = round == job.rounds
        if job.budget is not None and (over := job.budget.ends(round)) is not None:
            last, self.progress = True, replace(self.progress, why=over)
        if last or (job.eval_every and round % job.eval_every == 0):
            scored = self.score()
            why = job.stop(self.standing) if job.stop is not None and not last and round > job.warmup else None
            if why:
                last, self.progress = True, replace(self.progress, why=why if isinstance(why, str) else "stopped")
            if last and job.keep == "last":
                check_scores(scored, round)
        self.save(finished=last)
        if self.book is not None:
            self.book.round(record)
        self.memories.prune(checkpoint.rounds(self.states)[-checkpoint.KEPT :][0])

    def score(self) -> list[Record]:
        """Evaluate; what this process itself has measured."""
        job, round = self.job, self.progress.round
        if job.carry is None:
            job.method.materialise(self.state, job.net)
        own = job.evaluate() if job.carry is None else []
        server = self.seats.server(round, self.members.now)
        rows = own + (self.survey(self.state, server, self.held) if self.survey is not None else [])
        for row in rows:
            record = {"round": round, **row}
            records.append(self.evals, record)
            self.scores += 1
            job.watch.evaluated(record)
        if job.stop is not None or job.keep == "best":
            self._compare(rows)
        return own

    @property
    def standing(self) -> Record:
        """What `Job.stop` is called with."""
        now = self.progress
        best = {"best": now.best, "best_loss": now.best_loss, "waited": now.waited}
        return {"round": now.round, "loss": self.loss, "on": self.split, **best}

    def save(self, finished: bool = False) -> None:
        """Write the checkpoint of the round that the run has come to."""
        peak = max(self.progress.peak_memory_bytes, memory.peak() - self.job.memory_before_model)
        before, now = self.kept, self.progress.round
        self.progress = replace(
            self.progress,
            held={str(id): version for id, version in self.held.items()},
            seconds=self.progress.seconds + time.perf_counter() - self.clock,
            peak_memory_bytes=peak,
            finished=finished,
            memory={str(id): written for id, written in self.memories.newest.items()},
            evals=self.scores,
            versions=self.versions.kept(),
        )
        # the best round's checkpoint stays, and the one before it while a checkpoint means it
        self.kept = self.progress.best
        checkpoint.write(self.states, self.state, self.progress, {before, self.kept})
        self.versions.trim()
        if self.job.transport is not None:  # clients elsewhere have nets of their own, and work long: no model is idle
            self.state = checkpoint.on_disk(self.states, now, self.job.method.State)
            self.job.net.rest()
            memory.trim()
        self.clock = time.perf_counter()

    def end(self) -> Record:
        """Save the model and the summary, which it returns."""
        job, now = self.job, self.progress
        if job.cross and self.survey is not None:
            compared = Cross(job.method, self.survey, job.names, self.replies, self.states)
            compared.write(job.folder, self.state, self.seats, self.members.now, self.held)
        chosen = now.round if job.keep == "last" or now.best is None else now.best
        state = self.state if chosen == now.round else checkpoint.kept(self.states, chosen, job.method.State)
        if job.carry is None:
            job.method.materialise(state, job.net)
        evals = read_records(self.evals)
        summary: Record = {
            "rounds": now.round,
            "bytes_up": now.bytes_up,
            "bytes_down": now.bytes_down,
            "seconds": now.seconds,
            "peak_memory_bytes": now.peak_memory_bytes,
            "parameters": job.net.size,
            "model_bytes": job.net.nbytes,
            "first": [row for row in evals if row["round"] == 0 and row.get("split") != SELECTION],
            "final": [row for row in evals if row["round"] == chosen and row.get("split") != SELECTION],
            "sha256": job.net.state_sha256() if job.carry is None else None,
            **({"bytes_keys": now.bytes_keys} if now.bytes_keys else {}),
            **({"ended": now.why} if now.why is not None else {}),
            **({"privacy": job.budget.statement(now.round)} if job.budget is not None else {}),
            **({"kept": {"round": chosen, "on": self.split}} if job.keep == "best" else {}),
        }
        if job.carry is None:
            job.net.save(job.folder / "model", job.card(summary) if job.card is not None else None)
        else:
            job.carry(state, job.folder)
        shutil.rmtree(self.spool)
        if self.book is not None:
            self.book.end(now.round, summary["sha256"])
            summary["audit"] = self.book.head
        files.write(job.folder / "summary.json", records.dumps(summary, indent=2) + "\n")
        return summary

    def _turn(self) -> None:
        self.members.turn(self.progress.round, self.book)
        self.seats = replace(self.seats, clients=len(self.members.now))

    def _seen(self, round: int, client: int, up: Any) -> None:
        if self.job.replies:
            self.replies.keep(round, client, up)
        if self.job.seen is not None:
            self.job.seen(round, client, up)

    def _check(self, kept: Progress) -> None:
        self.memories.check({int(id): written for id, written in (kept.memory or {}).items()})

    def _compare(self, rows: Sequence[Record]) -> None:
        """Whether this is the best round so far; a loss that is not finite is worse than any."""
        now = self.progress
        if now.round == 0:
            self.split = self.job.on or next((row["split"] for row in rows), None)
        if self.split is None:
            raise ConfigError("eval.patience, eval.keep: no rows are held out to show which round is better")
        self.loss = loss = loss_on(rows, self.split)
        if self.job.warmup and now.round <= self.job.warmup:
            return
        if loss is not None and (now.best_loss is None or loss < now.best_loss):
            self.progress = replace(now, best=now.round, best_loss=loss, waited=0)
        else:
            self.progress = replace(now, waited=now.waited + 1)
