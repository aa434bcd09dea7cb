"""Rows for a classifier: a text, and the class that a column names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from thinwire.data import templates
from thinwire.data.batch import Dataset, Example
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.rows import Row
from thinwire.data.templates import AnyTemplate, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE = Template("{input}", "{output}")
"""What a classifier is shown where the run sets nothing else: the column `input`, whose class is in `output`."""


def classes_of(rows: Iterable[Row], template: AnyTemplate = WHOLE) -> tuple[str, ...]:
    """The classes that the rows name: numbers in order, else by the alphabet. DataError: fewer than two."""
    found = {templates.answer_value(row, template).strip(): row for row in rows}
    if len(found) < 2:
        raise DataError(f"{next(iter(found.values())).source if found else 'the data'}: names fewer than two classes")
    try:
        return tuple(sorted(found, key=int))
    except ValueError:
        return tuple(sorted(found))


def classify(
    rows: Sequence[Row],
    template: AnyTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    classes: Sequence[str],
    drop: bool = False,
) -> Dataset:
    """The rows as texts of at most `max_length` tokens, the tokenizer's special ones included, and their classes.

    Too long a text loses its end, or with `drop` is left out; the data set counts both. DataError for no rows, for rows
    that the template refuses, and for a class that is not among `classes`.
    """
    if not rows:
        raise DataError("there are no rows")
    examples, cut = [], 0
    for row in rows:
        text = templates.render(row, template, tokenizer)
        name = templates.answer_value(row, template).strip()
        if name not in classes:
            raise row.error(f"the class {name[:40]!r} is unseen in training, where there are: {', '.join(classes)}")
        tokens = tuple(tokenizer(text.prompt, verbose=False)["input_ids"])
        if len(tokens) > max_length:
            if drop:
                continue
            cut += 1
            tokens = tuple(tokenizer(text.prompt, truncation=True, max_length=max_length)["input_ids"])
        if not tokens:
            raise row.error("the text has no tokens")
        choice = list(classes).index(name)
        place = f"{row.source}:{row.line}"
        examples.append(Example(tokens, (), choice, references=(name,), text=text.prompt, place=place))
    if not examples:
        raise NoRowsLeft(f"{rows[0].source}: none of {len(rows)} rows fits into {max_length} tokens")
    # a class is a candidate of no tokens
    none, dropped = ((),) * len(classes), len(rows) - len(examples)
    return Dataset(tuple(examples), tokenizer.pad_token_id or 0, none, tuple(classes), cut=cut, dropped=dropped)
