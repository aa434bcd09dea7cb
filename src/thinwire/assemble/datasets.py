"""From rows to what a model is trained and scored on, and what of it that model cannot take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from thinwire import config
from thinwire.assemble.model import classes_of
from thinwire.assemble.rows import Rows, in_words, read_source, rejected_template, template_of
from thinwire.config import ConfigError, Run
from thinwire.data import templates
from thinwire.data.batch import Dataset, Example
from thinwire.data.classes import classify
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.pairs import NEGATIVE, pairs
from thinwire.data.preference import sides
from thinwire.data.rows import Row
from thinwire.data.tokenise import tokenise_groups
from thinwire.evaluate.preference import measured
from thinwire.model.net import Net
from thinwire.train.parallel import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    template, longest, drop = template_of(data, classes is not None), data.max_length, data.too_long == "drop"
    if data.loss == "contrastive":
        negative = None
        if data.rejected is not None:
            negative = rejected_template(data)
        elif data.prompt is None and any(row.has("negative") for rows in groups for row in rows):
            negative = NEGATIVE
        made = pairs(groups, template, negative, tokenizer, max_length=longest, drop=drop)
        return [replace(each, scale=data.scale) for each in made]
    if data.loss == "dpo":
        worse = rejected_template(data)
        both = [[sides(row, template) if data.rejected is None else (row, row) for row in rows] for rows in groups]
        better, others = ([[pair[i] for pair in held] for held in both] for i in (0, 1))
        made = tokenise_groups(
            better, template, tokenizer, max_length=longest, too_long=data.too_long, rejected=(others, worse)
        )
        return [replace(each, beta=data.beta) for each in made]
    groups = [in_words(data, rows) for rows in groups]
    if classes is None:
        return tokenise_groups(
            groups, template, tokenizer, max_length=longest, choices=data.choices, too_long=data.too_long
        )
    found = []
    for i, rows in enumerate(groups):
        try:
            found.append(classify(rows, template, tokenizer, max_length=longest, classes=classes, drop=drop))
        except NoRowsLeft as error:
            error.group = i
            raise
    return found


def scored_data(run: Run, groups: Sequence[list[Row]], net: Net) -> list[Dataset]:
    """Of each group of rows what an evaluation scores, at most eval.rows; the net is the start model. DataError."""
    found = datasets(run.data, groups, net.tokenizer, classes_of(run, net.folder))
    few = [replace(data, examples=data.examples[: run.eval.rows]) for data in found]
    return [referenced(run, data, net, run.eval.batch_size) for data in few]


def referenced(run: Run, data: Dataset, net: Net, batch_size: int) -> Dataset:
    """The data set, of preferences with the reference that the net has now, while it is the start model.

    Measured once, so that no second model is ever needed. A hollow net has none to give. Raises DataError.
    """
    if data.beta is None or any(p.is_meta for p in net.model.parameters()):
        return data
    check_context(net.positions, run.model.path, data.examples)
    check_tokens(net, run.model.path, data)
    return measured(net.model, data, batch_size)


def client_data(run: Run, rows: list[Row], net: Net) -> Dataset:
    """A client's rows as it trains on them, the net being the start model; raises DataError."""
    return _training_data(run, [rows], net)[0]


def clients_data(run: Run, rows: Rows, net: Net) -> list[Dataset]:
    """The data set of each client, in order, the net being the start model.

    Raises DataError, also for a client that is left with nothing.
    """
    try:
        return _training_data(run, list(rows.clients.values()), net) if rows.clients else []
    except NoRowsLeft as error:
        raise DataError(f"client {list(rows.clients)[error.group]!r} is empty: {error}") from None


def _training_data(run: Run, groups: Sequence[list[Row]], net: Net) -> list[Dataset]:
    training = run.data.model_copy(update={"choices": None}) if run.data.loss == "answer" else run.data
    pack = run.data.max_length if run.data.pack else 0
    found = datasets(training, groups, net.tokenizer, classes_of(run, net.folder))
    if run.method.classes_only and found and found[0].candidates is None:
        raise ConfigError(
            f"data.choices: missing; {config.method_name(run.method)} is for a closed set of answers that are scored, "
            "and these are open"
        )
    if run.method.hollow and run.data.loss == "dpo":
        raise ConfigError(
            f'data.loss: "dpo" compares with the start model, which a client of {config.method_name(run.method)} does '
            "not have in memory"
        )
    if run.data.loss == "contrastive":
        _check_batches(run, found)
    # as many at a time as a step has: no pass needs more memory than those that are to come
    found = [referenced(run, data, net, run.method.work(1).batch) for data in found]
    focus = run.data.focus if run.data.order == "lfr" else None
    if focus is not None and ranks()[1] > 1:
        raise ConfigError(
            "data.order: lfr is for a client of one process; each of several sees but its share of losses"
        )
    if not run.data.balanced and not pack and focus is None:
        return found
    return [replace(data, balanced=run.data.balanced, pack=pack, focus=focus) for data in found]


def _check_batches(run: Run, found: Sequence[Dataset]) -> None:
    """Raise ConfigError or DataError where a step would have no other pair to compare with."""
    work = run.method.work(1)
    if ranks()[1] > 1 and not work.probes:
        raise ConfigError(
            'data.loss: "contrastive" is for a client of one process; each of several sees but its share of a batch'
        )
    for data in found:
        if data.examples[0].rejected:
            continue
        if work.batch < 2:
            raise ConfigError("method.batch_size: a batch of one pair has no other to compare it with; take more")
        if len(data) < 2:
            place = data.examples[0].place
            raise DataError(f"{place}: the client's only pair, so that there is no other to compare with")


def public_data(run: Run, net: Net) -> Dataset | None:
    """The rows that the server holds, if the run names any; raises DataError."""
    return None if run.data.public is None else client_data(run, read_source(run.data.public), net)


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
                yield example.place, example.answer + example.rejected, written
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
        found = max(found, *example.prompt, *example.answer, *example.rejected)
    return max(found, *itertools.chain.from_iterable(data.candidates or ()), 0)
