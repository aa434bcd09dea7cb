"""From a run to a job that is ready to go."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from thinwire import config, memory
from thinwire.assemble.agreement import agreement_of, check_agreement
from thinwire.assemble.card import card
from thinwire.assemble.choice import check_choice, choice_of, stop_of
from thinwire.assemble.datasets import (
    check_answers,
    check_context,
    check_tokens,
    clients_data,
    public_data,
    scored_data,
)
from thinwire.assemble.model import classes_of, net_of, settled, use_threads
from thinwire.assemble.privacy import budget_of, check_privacy
from thinwire.assemble.replay import check_cross
from thinwire.assemble.rows import Rows, rows_of
from thinwire.assemble.scores import loss_on, scorer, splits_of
from thinwire.assemble.secure import check_secure, secured
from thinwire.config import ConfigError, Run
from thinwire.data.batch import Dataset
from thinwire.evaluate.clients import Evaluation
from thinwire.keys import Key
from thinwire.model.net import Net
from thinwire.runtime.endpoint import Action
from thinwire.runtime.job import Job, Watch
from thinwire.train.objective import keeps_apart
from thinwire.wire.frame import absorb, header_room


class Start(NamedTuple):
    """What a run begins with. `run`: with a fresh classifier's classes; `before`: bytes resident before the model."""

    run: Run
    rows: Rows
    net: Net
    before: int

    def job(self, folder: Path, watch: Watch) -> Job:
        """The run, ready to go; raises DataError."""
        return job(self.run, self.rows, self.net, folder, self.before, watch)


def prepared(run: Run, rows: Rows | None = None) -> tuple[Run, Rows]:
    """The run with the classes of a fresh classifier, and its rows: `rows`, or those that the run file names.

    Raises DataError, ConfigError, ModelError.
    """
    if rows is None:
        rows = rows_of(run.data, Key.root(run.seed))
    check_agreement(run, list(rows.clients))
    check_privacy(run, list(rows.clients))
    check_secure(run, list(rows.clients))
    check_choice(run, list(rows.splits))
    return settled(run, rows), rows


def begin(run: Run, rows: Rows, hollow: bool = False) -> Start:
    """The start model beside what was prepared, in the run's number of threads; raises ModelError, ConfigError."""
    use_threads(run)
    before = memory.resident()
    return Start(run, rows, net_of(run, remember=True, hollow=hollow), before)


def identity(run: Run) -> int:
    """The number that a run's frames carry: 32 bits of a hash of its file, without what makes no other run of it."""
    aside: dict[str, Any] = {
        "environment": {},
        "threads": None,
        "track": config.Track(),
        "federation": None,
        "privacy": None,
    }
    same = run.model_copy(update=aside)
    newer = {"patience": 0, "keep": "last"}  # a run that goes without them is the one that it was before they came
    unset = {"eval": {name for name, default in newer.items() if getattr(run.eval, name) == default}}
    if run.data.order == "random":
        unset["data"] = {"order", "focus"}
    text = same.to_toml(unset)
    if (weights := agreement_of(run)) is not None:
        text += weights.model_dump_json()
    if run.privacy is not None:
        text += run.privacy.model_dump_json(exclude={"secure"} if run.privacy.secure is None else None)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def fingerprints(job: Job) -> dict[str, str]:
    """What a run goes on with must be: hashes of the clients' examples, and of the weights that they start from."""
    rows, weights = xxhash.xxh3_128(), xxhash.xxh3_128()
    for name, data in zip(job.names, job.clients, strict=True):
        parts = [f"{name} {len(data.examples)}\n".encode()]
        for example in data.examples:
            parts.append(f"{len(example.prompt)} {example.choice} ".encode())
            parts.append(array("q", example.prompt + example.answer + example.rejected).tobytes())
        rows.update(b"".join(parts))
    absorb(weights, ((name, job.net.base[name]) for name, _ in job.net.trained()))
    return {"rows": rows.hexdigest()[:16], "weights": weights.hexdigest()[:16]}


def job(run: Run, rows: Rows, net: Net, folder: Path, memory_before_model: int, watch: Watch) -> Job:
    """The run, ready to go; raises DataError."""
    clients = clients_data(run, rows, net)
    classes = classes_of(run, net.folder)
    public = public_data(run, net)
    check_context(net.positions, run.model.path, (e for data in clients for e in data.examples))
    check_tokens(net, run.model.path, *clients, *([public] if public is not None else []))
    score = scorer(run, net, splits_of(run, rows, net))
    if run.data.choices is not None and rows.clients:  # a server of a federation has nobody's rows
        check_answers(run.data, rows)
    if run.data.pack and rows.clients:
        _check_packing(net, run.model.path, clients)
    actions: dict[str, Action] = {}
    if run.federation is not None and run.federation.evaluate:
        scored = scored_data(run, list(rows.clients.values()), net) if clients else []
        actions["evaluate"] = Evaluation(dict(enumerate(scored)), heldout=False, settings=run.eval)
    if run.federation is not None and run.federation.cross:
        check_cross(run)
    plain = Job(
        method=run.method,
        net=net,
        clients=clients,
        names=list(rows.clients),
        folder=folder,
        run=identity(run),
        key=Key.root(run.seed),
        rounds=run.rounds,
        segments=run.cohort,
        max_bytes=run.method.reply_bytes(net) + header_room(run.method.Up, net.names),
        evaluate=score,
        eval_every=run.eval.every,
        public=public,
        loss=loss_on(run, net, public),
        keep_versions=8 + run.method.versions_each * len(rows.clients),
        memory_before_model=memory_before_model,
        watch=watch,
        card=lambda summary: card(run, rows, summary, classes),
        actions=actions,
        stop=stop_of(run),
        keep=run.eval.keep,
        on=choice_of(run),
        warmup=run.eval.warmup or 0,
        weights=agreement_of(run),
        budget=budget_of(run, {id: len(data) for id, data in enumerate(clients)}, len(clients)) if clients else None,
        audit=run.federation is not None and run.federation.audit,
        replies=run.federation is not None and (run.federation.keep_replies or run.federation.cross),
        cross=run.federation is not None and run.federation.cross,
        late=0 if run.federation is None else run.federation.late,
    )
    return secured(run, plain)


def _check_packing(net: Net, model: str, clients: list[Dataset]) -> None:
    few = sorted((e for data in clients for e in data.examples), key=len)[:2]
    if len(few) == 2 and not keeps_apart(net.model, *few):
        raise ConfigError(f"data.pack: {model} does not keep the examples of a row apart; leave it out")
