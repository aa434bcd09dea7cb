"""The last round of a run, done again with some of its replies: what the model would have been without the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from thinwire import config
from thinwire.aggregate.weights import Weighing
from thinwire.assemble.agreement import agreement_of
from thinwire.assemble.datasets import check_context, dataset
from thinwire.assemble.model import classes_of, net_of, settled, use_threads
from thinwire.assemble.rows import read_source, rows_of
from thinwire.config import ConfigError
from thinwire.evaluate.splits import Split, evaluate
from thinwire.keys import Key
from thinwire.model.classifier import labels_of, task_of
from thinwire.model.resolve import resolve
from thinwire.records import read_records, visits
from thinwire.runtime import checkpoint
from thinwire.runtime.replies import Replies
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import VersionStore


class Replay:
    """A run's last round. `loss` is that of the public rows; `place`: an empty folder, beside the run's, to work in.

    `round`: which it was; `clients`: whose replies there are; `names`: what they are called; `rows`: the public ones.
    ConfigError: the run has kept no replies, or the server no rows.
    """

    def __init__(self, folder: Path, place: Path, overrides: Iterable[str] = ()) -> None:
        run, self.replies = config.load(folder / "run.toml", list(overrides)), Replies(folder / "replies")
        self.folder, self.states = folder, folder / "state"
        if (public := run.data.public) is None:
            raise ConfigError("data.public: missing; contributions are measured on rows that the server holds")
        records = [record for record in read_records(folder / "rounds.jsonl") if self.replies.clients(record["round"])]
        there = checkpoint.rounds(self.states)
        if not records or records[-1]["round"] - 1 not in there:
            raise ConfigError(
                f"{folder}: no replies of its last round were kept, or not the state before it; a run with "
                "federation.keep_replies = true keeps them"
            )
        self.round, self.clients = records[-1]["round"], self.replies.clients(records[-1]["round"])
        self.cohort = tuple(visit["id"] for visit in visits(records[-1]))
        self.names = {visit["id"]: str(visit["name"]) for record in records for visit in visits(record)}
        task = task_of(resolve(run.model.path), run.model.task)
        if task == "classification" and labels_of(resolve(run.model.path)) is None and run.data.choices is None:
            run = settled(run, rows_of(run.data, Key.root(run.seed)))
        use_threads(run)
        self.run, self.net = run, net_of(run, remember=True)
        data = dataset(run.data, read_source(public), self.net.tokenizer, classes_of(run, self.net.folder))
        check_context(self.net.positions, run.model.path, data.examples)
        self.public = data
        self.data = replace(data, examples=data.examples[: run.eval.rows])
        self.versions = _Beside(VersionStore(self.states / "versions"), VersionStore(place / "versions", keep=1))

    @property
    def rows(self) -> int:
        """How many rows the loss is measured on."""
        return len(self.data)

    def loss(self, clients: frozenset[int]) -> float:
        """The loss on the public rows after the round with these replies alone; nats a token."""
        run, net = self.run, self.net
        seats = Seats(Key.root(run.seed), run.rounds, net, self.versions, public=self.public, clients=len(self.names))
        names = [self.names.get(id, "") for id in range(max(self.names) + 1)]
        server = replace(seats.server(self.round, self.cohort), weighing=Weighing(agreement_of(run), names))
        some = tuple(client for client in self.cohort if client in clients and client in self.clients)
        state = checkpoint.on_disk(self.states, self.round - 1, run.method.State)
        state, _ = run.method.aggregate(state, server, self.replies.of(self.round, run.method.Up, some))
        run.method.materialise(state, net)
        return evaluate(net, Split("public", self.data), run.eval.batch_size).loss


class _Beside:
    """The versions of a run, to which nothing is added: what is put goes to a store of its own."""

    def __init__(self, known: VersionStore, own: VersionStore) -> None:
        self.known, self.own = known, own

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """See core.Versions."""
        return self.own.put(tensors)

    def get(self, version: str) -> Mapping[str, Tensor] | None:
        """See core.Versions."""
        found = self.known.get(version)
        return self.own.get(version) if found is None else found
