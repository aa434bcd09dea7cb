"""From a run file to the parts of a run: rows, model, data sets, job."""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from thinwire import config
from thinwire.config import ConfigError, Run
from thinwire.data import partition, templates
from thinwire.data.batch import Dataset, Example
from thinwire.data.classes import WHOLE, classify
from thinwire.data.classes import classes_of as find_classes
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.rows import Row
from thinwire.data.source import KINDS, is_folder_of_files, read, read_clients
from thinwire.data.tokenise import shuffle_answers, tokenise, tokenise_groups
from thinwire.evaluate.splits import Split, answers, evaluate
from thinwire.keys import Key
from thinwire.methods import FedKSeed, FedZO
from thinwire.model.classifier import labels_of, task_of
from thinwire.model.net import Net
from thinwire.model.resolve import resolve
from thinwire.perturb import probe
from thinwire.perturb.directions import Directions
from thinwire.runtime.cohort import check_clients
from thinwire.runtime.course import Job, Watch
from thinwire.train.objective import keeps_apart
from thinwire.train.parallel import device_of
from thinwire.wire import raw
from thinwire.wire.frame import header_room

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
        if not is_folder_of_files(data.path):
            raise ConfigError(f"data.partition: 'files' needs data.path to be a folder of files, got {data.path}")
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
    """The prompt template that the run file says, for a classifier the bare text by default; raises ConfigError."""
    if data.prompt is None or data.answer is None:
        return WHOLE if classifies and data.template == "plain" else templates.named(data.template)
    kind = templates.Jinja if data.template == "jinja" else templates.Template
    try:
        return kind(data.prompt, data.answer)
    except DataError as error:
        raise ConfigError(f"data.prompt, data.answer: {error}") from None


def in_words(data: config.Data, rows: list[Row]) -> list[Row]:
    """The rows with their answers put into data.words, if there are any; raises DataError."""
    if data.words is None:
        return rows
    template = template_of(data)
    return [_in_words(row, templates.answer_column(row, template), data.words) for row in rows]


def dataset(
    data: config.Data, rows: list[Row], tokenizer: PreTrainedTokenizerBase, classes: tuple[str, ...] | None = None
) -> Dataset:
    """The rows under the run's template, for a classifier if there are `classes`; raises DataError."""
    return datasets(data, [rows], tokenizer, classes)[0]


def datasets(
    data: config.Data,
    groups: Sequence[list[Row]],
    tokenizer: PreTrainedTokenizerBase,
    classes: tuple[str, ...] | None = None,
) -> list[Dataset]:
    """A data set of each group of rows; raises DataError."""
    template, longest = template_of(data, classes is not None), data.max_length
    groups = [in_words(data, rows) for rows in groups]
    if classes is None:
        return tokenise_groups(
            groups, template, tokenizer, max_length=longest, choices=data.choices, too_long=data.too_long
        )
    found, drop = [], data.too_long == "drop"
    for i, rows in enumerate(groups):
        try:
            found.append(classify(rows, template, tokenizer, max_length=longest, classes=classes, drop=drop))
        except NoRowsLeft as error:
            error.group = i
            raise
    return found


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
    """The run with the classes of a fresh classifier found in the clients' rows, unless it lists them itself.

    ConfigError for a cohort of clients that have no rows.
    """
    folder = resolve(run.model.path)
    check_clients(run.cohort, len(rows.clients))
    fresh = task_of(folder, run.model.task) == "classification" and labels_of(folder) is None
    if not fresh or run.data.choices is not None:
        return run
    held = [row for rows in rows.clients.values() for row in in_words(run.data, rows)]
    found = find_classes(held, template_of(run.data, True))
    return run.model_copy(update={"data": run.data.model_copy(update={"choices": found})})


def client_data(run: Run, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A client's rows as it trains on them; raises DataError."""
    return _training_data(run, [rows], tokenizer)[0]


def _training_data(run: Run, groups: Sequence[list[Row]], tokenizer: PreTrainedTokenizerBase) -> list[Dataset]:
    training = run.data.model_copy(update={"choices": None}) if run.data.loss == "answer" else run.data
    pack = run.data.max_length if run.data.pack else 0
    found = datasets(training, groups, tokenizer, classes_of(run))
    if not run.data.balanced and not pack:
        return found
    return [replace(data, balanced=run.data.balanced, pack=pack) for data in found]


def clients_data(run: Run, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Dataset]:
    """The data set of each client, in order; raises DataError, also for a client that is left with nothing."""
    try:
        return _training_data(run, list(rows.clients.values()), tokenizer) if rows.clients else []
    except NoRowsLeft as error:
        raise DataError(f"client {list(rows.clients)[error.group]!r} is empty: {error}") from None


def check_answers(data: config.Data, rows: Rows) -> None:
    """Raise DataError for a closed set of answers of which one is never seen in training."""
    template = template_of(data)

    def answer(row: Row) -> str:
        return templates.answer_value(row, template)

    unseen = set(data.choices or ())
    for held in rows.clients.values():
        unseen.difference_update(map(answer, in_words(data, held)))
        if not unseen:
            return
    choice = next(choice for choice in data.choices or () if choice in unseen)
    others = [row for held in rows.splits.values() for row in in_words(data, held) if answer(row) == choice]
    where = f"; {others[0].source}:{others[0].line} holds it out" if others else ""
    raise DataError(f"data.choices: no client's row has the answer {choice!r}{where}")


def check_context(context: int | None, model: str, examples: Iterable[Example]) -> None:
    """Raise DataError for an example that is longer than the model's context."""
    if context is None:
        return
    for example in examples:
        if len(example) > context:
            raise DataError(
                f"{example.place}: the row has {len(example)} tokens, and the context of {model} is {context}; "
                f"set data.max_length to {context} or less"
            )


def check_tokens(net: Net, model: str, *sets: Dataset) -> None:
    """Raise DataError for an example or an answer with a token for which the model's embedding, or head, has no row."""
    read, written = net.rows
    fits = min(read, written)
    if all(_largest(data) < fits for data in sets):
        return

    def parts() -> Iterator[tuple[str, tuple[int, ...], int]]:
        for data in sets:
            for example in data.examples:
                yield example.place, example.prompt, read
                yield example.place, example.answer, written
            yield "the chat template's generation prompt", data.asked, read
        for closed in {data.candidates for data in sets if data.candidates}:
            for answer in closed:
                yield "data.choices", answer, written

    for place, tokens, rows in parts():
        if max(tokens, default=0) >= min(rows, read):
            beyond = next(token for token in tokens if token >= min(rows, read))
            raise DataError(
                f"{place}: the token {net.tokenizer.convert_ids_to_tokens(beyond)!r} has the number {beyond}, and the "
                f"{'embedding' if read <= rows else 'head'} of {model} has {min(rows, read)} rows: leave it out, or "
                "enlarge the model (resize_token_embeddings of transformers)"
            )


def _largest(data: Dataset) -> int:
    """The largest token of the data set."""
    found = max(data.asked, default=0)
    for example in data.examples:
        found = max(found, *example.prompt, *example.answer)
    return max(found, *itertools.chain.from_iterable(data.candidates or ()), 0)


def public_data(run: Run, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The rows that the server holds, if the run names any; raises DataError."""
    return None if run.data.public is None else client_data(run, _read(run.data.public), tokenizer)


def _in_words(row: Row, column: str, words: Mapping[str, str]) -> Row:
    label = templates.answer_value(row, templates.Chat()) if templates.is_talk(row, column) else row.text(column)
    if label not in words:
        raise row.error(f"the answer {label!r} is not among data.words: {', '.join(words)}")
    return templates.with_answer(row, column, words[label])


def net_of(run: Run, remember: bool = False, hollow: bool = False) -> Net:
    """The run's start model in memory (unless hollow), in the run's view; raises ModelError."""
    model = run.model
    net = Net.open(
        model.path,
        model.dtype,
        remember=remember,
        device=device_of(model.device),
        view=model.view,
        hollow=hollow,
        classes=classes_of(run),
        head_key=Key.root(run.seed).fold("head"),
        bits=model.bits,
        view_key=Key.root(run.seed).fold(model.view.kind),
    )
    method = run.method
    if isinstance(method, FedKSeed | FedZO) and not hollow:
        probe.check(net, Directions(0, method.law, method.rank), method.together, config.method_name(method))
    return net


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


def prompts_of(run: Run, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The run's public prompts, none of them anybody's row: through the chat template where that is the run's."""
    if not run.eval.prompts:
        return None
    name = "chat" if run.data.template == "chat" and run.data.prompt is None else "completion"
    rows = [Row({"prompt": text, "completion": "-"}, "eval.prompts", i) for i, text in enumerate(run.eval.prompts, 1)]
    return tokenise(rows, templates.named(name), tokenizer, max_length=run.data.max_length)


def scorer(run: Run, net: Net, splits: list[Split]) -> Callable[[], list[dict[str, Any]]]:
    """A function that scores the weights in the net: one record a split, with the answers to a few rows.

    The first record also has the answers to the public prompts, as `public`. Raises DataError for rows beyond the
    model's context.
    """
    prompts = prompts_of(run, net.tokenizer)
    for split in splits:
        check_context(net.positions, run.model.path, split.data.examples)
    asked = [prompts] if prompts is not None else []
    check_tokens(net, run.model.path, *(split.data for split in splits), *asked)

    def score() -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for split in splits:
            result = evaluate(net, split, run.eval.batch_size, run.eval.max_new_tokens)
            shown = split.data.examples[:SHOWN] if run.eval.show_rows else ()
            given = answers(net, split.data, len(shown), run.eval.max_new_tokens) if shown else []
            samples = [
                {"prompt": e.text, "expected": e.references[0], "answer": answer.strip()}
                for e, answer in zip(shown, given, strict=True)
            ]
            # JSON has no infinity: a perplexity beyond all numbers is null.
            finite = {k: None if v == math.inf else v for k, v in asdict(result).items()}
            records.append({**finite, "samples": samples})
        if prompts is not None and records:
            given = answers(net, prompts, len(prompts), run.eval.max_new_tokens)
            pairs = zip(run.eval.prompts, given, strict=True)
            records[0]["public"] = [{"prompt": prompt, "answer": answer.strip()} for prompt, answer in pairs]
        return records

    return score


def identity(run: Run) -> int:
    """The number that a run's frames carry: 32 bits of a hash of its file, without what makes no other run of it."""
    aside = {"environment": {}, "threads": None, "track": config.Track(), "federation": None}
    same = run.model_copy(update=aside)
    return int.from_bytes(hashlib.sha256(same.to_toml().encode()).digest()[:4], "little")


def fingerprints(job: Job) -> dict[str, str]:
    """What a run goes on with must be: hashes of the clients' examples, and of the weights that they start from."""
    rows, weights = xxhash.xxh3_128(), xxhash.xxh3_128()
    for name, data in zip(job.names, job.clients, strict=True):
        parts = [f"{name} {len(data.examples)}\n".encode()]
        for example in data.examples:
            parts.append(f"{len(example.prompt)} {example.choice} ".encode())
            parts.append(array("q", example.prompt + example.answer).tobytes())
        rows.update(b"".join(parts))
    for name in job.net.names:
        tensor = job.net.base[name]
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        weights.update(raw(tensor))
    return {"rows": rows.hexdigest()[:16], "weights": weights.hexdigest()[:16]}


def job(run: Run, rows: Rows, net: Net, folder: Path, memory_before_model: int, watch: Watch) -> Job:
    """The run, ready to go; raises DataError."""
    from thinwire.card import card

    clients = clients_data(run, rows, net.tokenizer)
    public = public_data(run, net.tokenizer)
    check_context(net.positions, run.model.path, (e for data in clients for e in data.examples))
    check_tokens(net, run.model.path, *clients, *([public] if public is not None else []))
    score = scorer(run, net, splits_of(run, rows, net.tokenizer))
    if run.data.choices is not None and rows.clients:  # a server of a federation has nobody's rows
        check_answers(run.data, rows)
    if run.data.pack and rows.clients:
        _check_packing(net, run.model.path, clients)
    return Job(
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
        keep_versions=8 + run.method.versions_each * len(rows.clients),
        memory_before_model=memory_before_model,
        watch=watch,
        card=lambda summary: card(run, rows, summary, classes_of(run)),
    )


def _check_packing(net: Net, model: str, clients: list[Dataset]) -> None:
    few = sorted((e for data in clients for e in data.examples), key=len)[:2]
    if len(few) == 2 and not keeps_apart(net.model, *few):
        raise ConfigError(f"data.pack: {model} does not keep the examples of a row apart; leave it out")


def _read(path: str) -> list[Row]:
    if is_folder_of_files(path):
        raise ConfigError(f'{path}: is a folder, not a {KINDS} file; a folder goes with data.partition = "files"')
    return read(path)
