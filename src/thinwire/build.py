"""From a run file to the parts of a run: rows, model, data sets, job."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thinwire import config
from thinwire.config import ConfigError, Run
from thinwire.data import partition, templates
from thinwire.data.batch import Dataset
from thinwire.data.classes import WHOLE, classify
from thinwire.data.classes import classes_of as find_classes
from thinwire.data.errors import DataError
from thinwire.data.load import Row, read_clients, read_jsonl
from thinwire.data.packaged import PACKAGED
from thinwire.data.tokenise import shuffle_answers, tokenise
from thinwire.evaluate.evaluate import Split, answers, evaluate
from thinwire.keys import Key
from thinwire.model.adapters import add_lora
from thinwire.model.flat import Net
from thinwire.model.load import resolve
from thinwire.model.task import labels_of, task_of
from thinwire.runtime.loop import Job, Watch
from thinwire.train.parallel import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 4  # held-out rows whose answers are recorded, for people


@dataclass(frozen=True)
class Rows:
    """The rows of a run: client -> rows, and held-out split -> rows."""

    clients: dict[str, list[Row]]
    splits: dict[str, list[Row]]


def rows_of(data: config.Data, key: Key) -> Rows:
    """Read, hold out, partition; raises DataError or ConfigError. Needs no model."""
    if data.partition == "files":
        if data.path in PACKAGED or not Path(data.path).is_dir():
            raise ConfigError(
                f"data.partition: 'files' needs data.path to be a folder of .jsonl files, got {data.path}"
            )
        clients = read_clients(data.path)
    else:
        rows = _read(data.path)
        if data.rows is not None and data.rows < len(rows):
            rows = [rows[i] for i in sorted(key.fold("rows").permutation(len(rows))[: data.rows].tolist())]
        clients = partition.by_column(rows, data.column) if data.partition == "column" else {"": rows}
        if data.values is not None:
            if unknown := set(data.values) - set(clients):
                raise ConfigError(f"data.values: {min(unknown)!r} is not in column {data.column!r} of {data.path}")
            clients = {name: held for name, held in clients.items() if name in data.values}
    splits = {}
    if isinstance(data.heldout, str):
        splits["heldout"] = _read(data.heldout)
    elif data.heldout:
        parts = {
            name: partition.holdout(rows, data.heldout, key.fold("heldout", name)) for name, rows in clients.items()
        }
        clients = {name: kept for name, (kept, _) in parts.items()}
        splits["heldout"] = [row for _, held in parts.values() for row in held]
    if data.heldout_tasks is not None:
        splits["heldout_tasks"] = _read(data.heldout_tasks)
    if data.partition == "iid":
        clients = partition.iid(clients[""], data.clients, key.fold("partition"))
    elif data.partition == "dirichlet":
        split = key.fold("partition")
        clients = partition.dirichlet(clients[""], data.column, data.clients, data.alpha, split, minimum=data.minimum)
    for name, held in clients.items():
        if not held:
            raise DataError(f"{data.path}: client {name!r} has no rows")
    if splits.get("heldout") == []:
        raise ConfigError(f"data.heldout: {data.heldout} of each client's rows holds out none at all")
    if data.validation:
        # The held-out rows stay out of both, so that what is chosen here is chosen without them.
        keys = key.fold("validation")
        parts = {name: partition.holdout(held, data.validation, keys.fold(name)) for name, held in clients.items()}
        clients = {name: kept for name, (kept, _) in parts.items()}
        splits = {"validation": [row for _, held in parts.values() for row in held]}
        if not splits["validation"]:
            raise ConfigError(f"data.validation: {data.validation} of each client's rows holds out none at all")
    if data.shuffle_answers:
        # Within each client, so that its skew stays; the held-out rows keep their true answers.
        clients = {name: shuffle_answers(held, key.fold("shuffle", name)) for name, held in clients.items()}
    if data.pooled:
        clients = {"all": [row for held in clients.values() for row in held]}
    return Rows(clients, splits)


def dataset(
    data: config.Data, rows: list[Row], tokenizer: PreTrainedTokenizerBase, classes: tuple[str, ...] | None = None
) -> Dataset:
    """The rows under the run's template, for a classifier if there are `classes`; raises DataError."""
    template = template_of(data, classes is not None)
    rows = _worded(data, rows)
    drop = data.too_long == "drop"
    if classes is not None:
        return classify(rows, template, tokenizer, max_length=data.max_length, classes=classes, drop=drop)
    return tokenise(rows, template, tokenizer, max_length=data.max_length, choices=data.choices, drop=drop)


def template_of(data: config.Data, classifies: bool = False) -> templates.Template | templates.Chat:
    """How the run shows a row; raises ConfigError."""
    if data.prompt is not None and data.answer is not None:
        try:
            return templates.Template(data.prompt, data.answer)
        except DataError as error:
            raise ConfigError(f"data.prompt, data.answer: {error}") from None
    return WHOLE if classifies and data.template == "plain" else templates.named(data.template)


def classes_of(run: Run) -> tuple[str, ...] | None:
    """The classes of the run's classifier, in the model's order; None if the model is causal.

    They are those of the model, or data.choices for a fresh head; ConfigError where the two differ, or none is there.
    """
    folder = resolve(run.model.path)
    if task_of(folder, run.model.task) == "causal":
        return None
    own, wanted = labels_of(folder), run.data.choices
    if own is None and wanted is None:
        raise ConfigError(f"data.choices: missing; {run.model.path} gets a new head, so list its classes")
    if own is None or wanted is None:
        return own or wanted
    if set(own) == set(wanted):
        return own
    if len(own) != len(wanted) or own != tuple(map(str, range(len(own)))):
        raise ConfigError(f"data.choices: the classes of the model in {run.model.path} are {', '.join(own)}")
    return wanted  # its classes have numbers and no names


def settled(run: Run, rows: Rows) -> Run:
    """The run with the classes of a fresh classifier found in the clients' rows, unless it lists them itself."""
    folder = resolve(run.model.path)
    fresh = task_of(folder, run.model.task) == "classification" and labels_of(folder) is None
    if not fresh or run.data.choices is not None:
        return run
    held = [row for rows in rows.clients.values() for row in _worded(run.data, rows)]
    found = find_classes(held, template_of(run.data, True))
    return run.model_copy(update={"data": run.data.model_copy(update={"choices": found})})


def client_data(run: Run, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A client's rows as it trains on them; raises DataError."""
    training = run.data.model_copy(update={"choices": None}) if run.data.loss == "answer" else run.data
    return replace(dataset(training, rows, tokenizer, classes_of(run)), balanced=run.data.balanced)


def public_data(run: Run, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The rows that the server holds, if the run names any; raises DataError."""
    return None if run.data.public is None else client_data(run, _read(run.data.public), tokenizer)


def _worded(data: config.Data, rows: list[Row]) -> list[Row]:
    return rows if data.words is None else [_in_words(row, data.words) for row in rows]


def _in_words(row: Row, words: Mapping[str, str]) -> Row:
    label = row.text("output")
    if label not in words:
        raise row.error(f"the answer {label!r} is not among data.words: {', '.join(words)}")
    return Row({**row.fields, "output": words[label]}, row.source, row.line)


def net_of(run: Run, remember: bool = False, hollow: bool = False) -> Net:
    """The run's start model in memory (unless hollow), a LoRA view of it if the run says so; raises ModelError."""
    model, adapt = run.model, None
    if model.lora is not None:
        key = Key.root(run.seed).fold("lora")
        adapt = partial(add_lora, rank=model.lora.rank, alpha=model.lora.alpha, targets=model.lora.targets, key=key)
    return Net.open(
        model.path,
        model.dtype,
        remember=remember,
        device=device_of(model.device),
        adapt=adapt,
        hollow=hollow,
        classes=classes_of(run),
        head_key=Key.root(run.seed).fold("head"),
    )


def use_threads(run: Run) -> None:
    """Let torch, and the kernels with it, use as many threads as the run says."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)


def splits_of(run: Run, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Split]:
    """The held-out splits, at most eval.rows of each, the same ones every time."""
    splits = []
    for name, held in rows.splits.items():
        order = Key.root(run.seed).fold("eval", name).permutation(len(held))
        data = dataset(run.data, [held[i] for i in order], tokenizer, classes_of(run))
        data = replace(data, examples=data.examples[: run.eval.rows])
        splits.append(Split(name, data, run.eval.generate))
    return splits


def scorer(run: Run, net: Net, splits: list[Split]) -> Callable[[], list[dict[str, Any]]]:
    """A function that scores the weights in the net: one record a split, with the answers to a few rows."""
    for split in splits:
        _check_fits(net, split.data, f"the split {split.name}")

    def score() -> list[dict[str, Any]]:
        records = []
        for split in splits:
            result = evaluate(net, split, run.eval.batch_size, run.eval.max_new_tokens)
            shown = split.data.examples[:SHOWN]
            given = answers(net, split.data, len(shown), run.eval.max_new_tokens)
            samples = [
                {"prompt": e.text, "expected": e.references[0], "answer": answer.strip()}
                for e, answer in zip(shown, given, strict=True)
            ]
            # JSON has no infinity: a perplexity beyond all numbers is null.
            finite = {k: None if v == math.inf else v for k, v in asdict(result).items()}
            records.append({**finite, "samples": samples})
        return records

    return score


def job(run: Run, rows: Rows, net: Net, folder: Path, memory_before_model: int, watch: Watch) -> Job:
    """The run, ready to go; raises DataError."""
    from thinwire.card import card

    clients = [client_data(run, held, net.tokenizer) for held in rows.clients.values()]
    for name, data in zip(rows.clients, clients, strict=True):
        _check_fits(net, data, f"the client {name!r}" if name else "the clients")
    same = run.model_copy(update={"environment": {}, "threads": None})  # what does not make it another run
    identity = hashlib.sha256(same.to_toml().encode()).digest()
    return Job(
        method=run.method,
        net=net,
        clients=clients,
        names=list(rows.clients),
        folder=folder,
        run=int.from_bytes(identity[:4], "little"),
        key=Key.root(run.seed),
        rounds=run.rounds,
        segments=run.cohort,
        evaluate=scorer(run, net, splits_of(run, rows, net.tokenizer)),
        eval_every=run.eval.every,
        public=public_data(run, net.tokenizer),
        keep_versions=8 + run.method.versions_each * len(rows.clients),
        memory_before_model=memory_before_model,
        watch=watch,
        card=lambda summary: card(run, rows, summary, classes_of(run)),
    )


def _check_fits(net: Net, data: Dataset, whose: str) -> None:
    """ConfigError where a row is longer than the model's context."""
    answer = max(map(len, data.candidates or ()), default=0)
    longest = max((len(e.prompt) + max(len(e.answer), answer) for e in data.examples), default=0)
    if net.positions is not None and longest > net.positions:
        raise ConfigError(
            f"data.max_length: a row of {whose} has {longest} tokens, and the model's context {net.positions}: "
            f"set data.max_length={net.positions}"
        )


def _read(path: str) -> list[Row]:
    if path in PACKAGED:
        return PACKAGED[path]()
    if Path(path).is_dir():
        raise ConfigError(f'{path}: is a folder, not a .jsonl file; a folder goes with data.partition = "files"')
    return read_jsonl(path)
