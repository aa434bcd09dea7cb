"""From a row to a prompt and the answer that should follow it.

A template is two format strings over the row's columns, Template("{input} It was", " {output}"), or one of
NAMED,

    alpaca       instruction rows, the text of Stanford Alpaca; the answer follows "### Response:" at once
    plain        instruction rows, nothing but blank lines between the parts
    completion   prompt and completion as they are
    text         the column text, all of whose tokens are trained on: next-token prediction of plain text
    chat         any shape, as the tokenizer's own chat template writes the whole talk

or two Jinja templates, Jinja("{% if input is defined %}{{ input }}{% endif %} It was", " {{ output }}"). There a column
that is absent or null is not defined, and to use it is an error.

Both come from the run file only. Format strings may name columns and nothing else. What stands in the data is put in as
it is, so braces in the data mean nothing.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from thinwire.data.chat import messages_of, turn
from thinwire.data.errors import DataError
from thinwire.data.jinja import Jinja as Jinja
from thinwire.data.jinja import columns_of, fill, used
from thinwire.data.rendering import Message
from thinwire.data.rows import SHAPES, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_BARE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


AnyTemplate: TypeAlias = "Template | Jinja | Chat"


@functools.lru_cache
def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    """A format string as (literal text, column that follows it or None) pairs."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"the template {text!r} cannot be read ({error})") from None
    parts = []
    for literal, column, spec, conversion in parsed:
        if column is not None:
            plain = column.strip() and not column.isdigit() and not any(mark in column for mark in ".[]{}")
            if not plain or spec or conversion:
                raise DataError(
                    f"the template {text!r} may hold plain {{column}} fields only (a brace is written twice)"
                )
        parts.append((literal, column))
    return tuple(parts)


@functools.lru_cache
def _columns(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for _, column in _parts(text) if column is not None))


@functools.lru_cache
def _pattern(text: str) -> tuple[str, tuple[str, ...]]:
    """The format string for `%`, and the columns that go into it, in their order."""
    pattern = "".join(literal.replace("%", "%%") + "%s" * (column is not None) for literal, column in _parts(text))
    return pattern, tuple(column for _, column in _parts(text) if column is not None)


def _fill(text: str, value: Callable[[str], str]) -> str:
    pattern, columns = _pattern(text)
    return pattern % tuple(map(value, columns))


@dataclass(frozen=True)
class Template:
    """Format strings over a row's columns.

    `bare`, where given, is the prompt of a row whose column `input` is absent or blank. DataError for a
    string that asks for more than columns by name, and for an answer without a column.
    """

    prompt: str
    answer: str
    bare: str | None = None

    def __post_init__(self) -> None:
        for text in (self.prompt, self.answer, self.bare or ""):
            _parts(text)
        if not _columns(self.answer):
            raise DataError(f"the answer template {self.answer!r} names no {{column}}")


@dataclass(frozen=True)
class Chat:
    """The tokenizer's chat template. An instruction row becomes one message of the user."""


NAMED: dict[str, AnyTemplate] = {
    "alpaca": Template(ALPACA, "{output}", ALPACA_BARE),
    "plain": Template("{instruction}\n\n{input}\n\n", "{output}", "{instruction}\n\n"),
    "completion": Template("{prompt}", "{completion}"),
    "chat": Chat(),
    "text": Template("", "{text}"),
}


@dataclass(frozen=True)
class Rendered:
    """A row as text; the model reads prompt + answer with nothing between them.

    `end` is how a chat template ends the answer; where it is empty the tokenizer's end token does. `notes` are lines
    about what people may not expect of the row's text.
    """

    prompt: str
    answer: str
    end: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)


def named(name: str) -> AnyTemplate:
    """The template of that name; DataError that lists the names."""
    if name not in NAMED:
        raise DataError(f"unknown template '{name}' (known: {', '.join(NAMED)}, or your own prompt and answer)")
    return NAMED[name]


def render(row: Row, template: AnyTemplate, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The row's prompt and answer; DataError for a column that is missing or no text, and for a blank answer.

    Only Chat looks at the tokenizer.
    """
    if isinstance(template, Chat):
        talk = turn(row, talk_of(row), tokenizer)
        return Rendered(talk.prompt, talk.answer, talk.end, (*talk.notes, *_passed_over(row)))
    if isinstance(template, Jinja):
        columns = columns_of(row)
        rendered = Rendered(fill(template.prompt, columns, row), fill(template.answer, columns, row))
        if not rendered.answer.strip():
            raise row.error("the answer is empty: there is no answer to learn")
        return rendered
    prompt = template.prompt
    if template.bare is not None and (row.fields.get("input") is None or not row.text("input").strip()):
        prompt = template.bare
    answer, asked = _fill(template.answer, row.text), _columns(template.answer)
    if not any(row.text(column).strip() for column in asked):
        raise row.error(f"field '{asked[0]}' is empty: there is no answer to learn")
    return Rendered(_fill(prompt, row.text), answer)


def answer_value(row: Row, template: AnyTemplate) -> str:
    """The bare answer, as the data has it; DataError where it is blank, or made of several columns."""
    column = answer_column(row, template)
    value = _message(row) if column == "messages" and isinstance(template, Chat) else row.text(column)
    if not value.strip():
        raise row.error(f"field '{column}' is empty: there is no answer to learn")
    return value


def is_talk(row: Row, column: str) -> bool:
    """Whether the column holds messages."""
    return column == "messages" and isinstance(row.fields.get(column), list)


def with_answer(row: Row, column: str, value: Any) -> Row:
    """The row with another bare answer in its `column`; of messages that is the content of the last."""
    if is_talk(row, column):
        *talk, last = messages_of(row)
        value = [*talk, {**last, "content": value}]
    return Row({**row.fields, column: value}, row.source, row.line)


def answer_text(template: AnyTemplate, value: str) -> str:
    """The answer of a row whose bare answer is `value`; DataError where answers are made of several columns."""
    if isinstance(template, Chat):
        return value
    column = _answer_column(template)
    if isinstance(template, Template):
        return _fill(template.answer, {column: value}.__getitem__)
    return fill(template.answer, {column: value}, Row({}, "the answer template", 1))


def answer_column(row: Row, template: AnyTemplate) -> str:
    """The column that holds the row's answer; DataError where the answer is made of several."""
    return row.answer_column() if isinstance(template, Chat) else _answer_column(template)


def answer_columns(template: Template | Jinja) -> tuple[str, ...]:
    """The columns of which the template makes an answer."""
    return _columns(template.answer) if isinstance(template, Template) else used(template.answer)


def references(row: Row, template: AnyTemplate, answer: str) -> tuple[str, ...]:
    """All accepted answers, the space around them cut: the rendered `answer`, then the column `references`."""
    listed = row.fields.get("references")
    if listed is None:
        return (answer.strip(),)
    if not isinstance(listed, list):
        raise row.error("field 'references' is not a list of texts")
    values = [row.as_text(value, f"entry {i} of field 'references'") for i, value in enumerate(listed, 1)]
    single = isinstance(template, Chat) or len(answer_columns(template)) == 1
    others = [answer_text(template, value) if single else value for value in values]
    return tuple(dict.fromkeys(text.strip() for text in (answer, *others)))


def talk_of(row: Row) -> list[Message]:
    """The row as messages, the answer the last of them; DataError for a row of no known shape, and a blank answer."""
    match column := row.answer_column():
        case "messages":
            messages = messages_of(row)
            if set(messages[-1]) <= {"role", "content"}:
                answer_value(row, Chat())
            return messages
        case "completion":
            asked = row.text("prompt")
        case _:
            if "conversations" in row.fields and column not in row.fields:
                raise row.error(
                    "field 'conversations' is not read: name it 'messages', and in each message 'from' 'role' (user, "
                    "assistant, system or tool) and 'value' 'content'"
                )
            asked = row.text("instruction")
            if row.has("input"):
                asked += "\n\n" + row.text("input")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer_value(row, Chat())}]


def _message(row: Row) -> str:
    last = messages_of(row)[-1]
    if "content" not in last:
        raise row.error("the last message has no text")
    return str(last["content"])


def _passed_over(row: Row) -> list[str]:
    """A line for a row that has answers in several columns."""
    taken = row.answer_column()
    others = [f"'{answer}'" for *_, answer in SHAPES if answer != taken and row.has(answer)]
    return [f"rows with several answers: '{taken}' is read, {' and '.join(others)} not"] if others else []


@functools.lru_cache
def _answer_column(template: Template | Jinja) -> str:
    columns = answer_columns(template)
    if len(columns) != 1:
        raise DataError(f"the answer template {template.answer!r} must name one {{column}} here, not {len(columns)}")
    return columns[0]
