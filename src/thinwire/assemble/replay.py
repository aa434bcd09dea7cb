"""The last round of a run, done again with some of its replies: what the model would have been without the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from thinwire import config
from thinwire.aggregate.weights import Weighing
from thinwire.assemble.agreement import agreement_of
from thinwire.assemble.datasets import check_context, datasets, referenced
from thinwire.assemble.model import classes_of, net_of, settled, use_threads
from thinwire.assemble.rows import Rows, read_source, rows_of
from thinwire.config import ConfigError, Full, Run, method_name
from thinwire.core import Averaged
from thinwire.evaluate.splits import Split, evaluate
from thinwire.keys import Key
from thinwire.model.classifier import labels_of, task_of
from thinwire.model.resolve import resolve
from thinwire.records import read_records, visits
from thinwire.runtime import checkpoint
from thinwire.runtime.cross import Beside, alone
from thinwire.runtime.outcome import lengths_of
from thinwire.runtime.replies import Replies
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import VersionStore


class Replay:
    """A run's last round. `loss` is that of the public rows; `place`: an empty folder, beside the run's, to work in.

    `round`: which it was; `clients`: whose replies there are; `names`: what they are called; `rows`: those that it is
    measured on. With `cross` these are the clients' own, and `losses` that of each client's.
    ConfigError: the run has kept no replies, or there are no such rows.
    """

    def __init__(self, folder: Path, place: Path, overrides: Iterable[str] = (), cross: bool = False) -> None:
        run, self.replies = config.load(folder / "run.toml", list(overrides)), Replies(folder / "replies")
        self.folder, self.states = folder, folder / "state"
        if cross:
            check_cross(run)
            if run.federation is not None and run.federation.sites:
                raise ConfigError("federation.sites: their rows are not here; federation.cross has the sites score")
        elif run.data.public is None:
            raise ConfigError("data.public: missing; contributions are measured on rows that the server holds")
        before = read_records(folder / "rounds.jsonl")
        records = [record for record in before if self.replies.clients(record["round"])]
        there = checkpoint.rounds(self.states)
        if not records or records[-1]["round"] - 1 not in there:
            raise ConfigError(
                f"{folder}: no replies of its last round were kept, or not the state before it; a run with "
                "federation.keep_replies = true keeps them"
            )
        self.round, self.clients = records[-1]["round"], self.replies.clients(records[-1]["round"])
        self.lengths = lengths_of([record for record in before if record["round"] < self.round])
        self.cohort = tuple(visit["id"] for visit in visits(records[-1]))
        self.names = {visit["id"]: str(visit["name"]) for record in records for visit in visits(record)}
        task = task_of(resolve(run.model.path), run.task)
        fresh = task == "classification" and labels_of(resolve(run.model.path)) is None and run.data.choices is None
        rows = rows_of(run.data, Key.root(run.seed)) if fresh or cross else Rows({}, {})
        if fresh:
            run = settled(run, rows)
        use_threads(run)
        self.run, self.net = run, net_of(run, remember=True)
        groups = [("public", read_source(run.data.public))] if run.data.public is not None else []
        groups += rows.clients.items() if cross else []
        found = datasets(run.data, [rows for _, rows in groups], self.net.tokenizer, classes_of(run, self.net.folder))
        for data in found:
            check_context(self.net.positions, run.model.path, data.examples)
        found = [referenced(run, data, self.net, run.eval.batch_size) for data in found]
        self.public = None if run.data.public is None else found[0]
        few = (replace(data, examples=data.examples[: run.eval.rows]) for data in found)
        splits = [Split(name, data) for (name, _), data in zip(groups, few, strict=True)]
        self.splits = splits[1:] if cross and self.public is not None else splits
        self.versions = Beside(VersionStore(self.states / "versions"), VersionStore(place / "versions", keep=1))

    @property
    def rows(self) -> int:
        """How many rows the loss is measured on."""
        return sum(len(split.data) for split in self.splits)

    def loss(self, clients: frozenset[int]) -> float:
        """The loss on the public rows after the round with these replies alone; nats a token."""
        return self.losses(clients)[0]

    def losses(self, clients: frozenset[int], own: bool = False) -> list[float]:
        """The same on the rows of each client, where it is made for these; `own`: by their plain mean."""
        run, net, method = self.run, self.net, self.run.method
        if own:
            method = alone(method)
        seats = Seats(Key.root(run.seed), run.rounds, net, self.versions, public=self.public, clients=len(self.names))
        names = [self.names.get(id, "") for id in range(max(self.names) + 1)]
        weighing = Weighing(agreement_of(run), names)
        server = replace(seats.server(self.round, self.cohort), weighing=weighing, lengths=self.lengths)
        some = tuple(client for client in self.cohort if client in clients and client in self.clients)
        state = checkpoint.on_disk(self.states, self.round - 1, method.State)
        state, _ = method.aggregate(state, server, self.replies.of(self.round, method.Up, some))
        method.materialise(state, net)
        return [evaluate(net, split, run.eval.batch_size).loss for split in self.splits]


def check_cross(run: Run) -> None:
    """ConfigError where what a client has learnt is no small part beside a model that all have."""
    if isinstance(run.model.view, Full):
        raise ConfigError("model.view: adapters and cores are compared, and this run trains whole models")
    if run.model.view.keep:
        raise ConfigError("model.view.keep: what stays at the clients is in no reply")
    if not isinstance(run.method, Averaged):
        raise ConfigError(f"method: {method_name(run.method)} has no reply that is a client's own")
