"""The rows of a run: read, held out, dealt to clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from thinwire import config
from thinwire.config import ConfigError
from thinwire.data import partition, templates
from thinwire.data.classes import WHOLE
from thinwire.data.errors import DataError
from thinwire.data.pairs import PAIR
from thinwire.data.rows import Row
from thinwire.data.source import KINDS, is_folder_of_files, read, read_clients
from thinwire.data.tokenise import shuffle_answers
from thinwire.keys import Key
from thinwire.records import SELECTION


@dataclass(frozen=True)
class Rows:
    """The rows of a run: client -> rows, and held-out split -> rows."""

    clients: dict[str, list[Row]]
    splits: dict[str, list[Row]]


def rows_of(data: config.Data, key: Key) -> Rows:
    """Read, hold out, partition; raises DataError or ConfigError. Needs no model."""
    if data.partition == "files":
        if not is_folder_of_files(data.path):
            raise ConfigError(f"data.partition: 'files' needs data.path to be a folder of files, got {data.path}")
        clients = read_clients(data.path)
    else:
        rows = read_source(data.path)
        if data.rows is not None and data.rows < len(rows):
            rows = [rows[i] for i in sorted(key.fold("rows").permutation(len(rows))[: data.rows].tolist())]
        clients = partition.by_column(rows, data.column) if data.partition == "column" else {"": rows}
        if data.values is not None:
            if unknown := set(data.values) - set(clients):
                raise ConfigError(f"data.values: {min(unknown)!r} is not in column {data.column!r} of {data.path}")
            clients = {name: held for name, held in clients.items() if name in data.values}
    splits = {}
    if isinstance(data.heldout, str):
        splits["heldout"] = read_source(data.heldout)
    elif data.heldout:
        parts = {
            name: partition.holdout(rows, data.heldout, key.fold("heldout", name)) for name, rows in clients.items()
        }
        clients = {name: kept for name, (kept, _) in parts.items()}
        splits["heldout"] = [row for _, held in parts.values() for row in held]
    if data.heldout_tasks is not None:
        splits["heldout_tasks"] = read_source(data.heldout_tasks)
    if data.partition == "iid":
        clients = partition.iid(clients[""], data.clients, key.fold("partition"))
    elif data.partition == "size":
        split = key.fold("partition")
        clients = partition.by_size(clients[""], data.clients, data.alpha, split, minimum=data.minimum)
    elif data.partition == "task":
        clients = partition.by_task(clients[""], data.column, data.clients, key.fold("partition"))
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
    if isinstance(data.selection, str):
        splits[SELECTION] = read_source(data.selection)
    elif data.selection is not None:
        keys = key.fold(SELECTION)
        parts = {name: partition.holdout(held, data.selection, keys.fold(name)) for name, held in clients.items()}
        clients = {name: kept for name, (kept, _) in parts.items()}
        splits[SELECTION] = [row for _, held in parts.values() for row in held]
        if not splits[SELECTION]:
            raise ConfigError(f"data.selection: {data.selection} of each client's rows holds out none at all")
    if data.shuffle_answers:
        # Within each client, so that its skew stays; the held-out rows keep their true answers.
        template = template_of(data)
        for name, held in clients.items():
            column = None if isinstance(template, templates.Chat) else templates.answer_column(held[0], template)
            clients[name] = shuffle_answers(held, key.fold("shuffle", name), column)
    if data.pooled:
        clients = {"all": [row for held in clients.values() for row in held]}
    return Rows(clients, splits)


def template_of(data: config.Data, classifies: bool = False) -> templates.AnyTemplate:
    """The prompt template of the run file, for a classifier the bare text by default; raises ConfigError."""
    if data.prompt is None or data.answer is None:
        if data.loss == "contrastive":
            return PAIR
        return WHOLE if classifies and data.template == "plain" else templates.named(data.template)
    kind = templates.Jinja if data.template == "jinja" else templates.Template
    try:
        return kind(data.prompt, data.answer)
    except DataError as error:
        raise ConfigError(f"data.prompt, data.answer: {error}") from None


def rejected_template(data: config.Data) -> templates.AnyTemplate:
    """The prompt template of the run file with its answers that were rejected; raises ConfigError."""
    template = template_of(data)
    if data.rejected is None or isinstance(template, templates.Chat):
        return template
    try:
        return replace(template, answer=data.rejected)
    except DataError as error:
        raise ConfigError(f"data.rejected: {error}") from None


def in_words(data: config.Data, rows: list[Row]) -> list[Row]:
    """The rows with their answers put into data.words, if there are any; raises DataError."""
    if data.words is None:
        return rows
    template = template_of(data)
    return [_in_words(row, templates.answer_column(row, template), data.words) for row in rows]


def _in_words(row: Row, column: str, words: Mapping[str, str]) -> Row:
    label = templates.answer_value(row, templates.Chat()) if templates.is_talk(row, column) else row.text(column)
    if label not in words:
        raise row.error(f"the answer {label!r} is not among data.words: {', '.join(words)}")
    return templates.with_answer(row, column, words[label])


def read_source(path: str) -> list[Row]:
    """The rows of one source; ConfigError for a folder of files."""
    if is_folder_of_files(path):
        raise ConfigError(f'{path}: is a folder, not a {KINDS} file; a folder goes with data.partition = "files"')
    return read(path)
