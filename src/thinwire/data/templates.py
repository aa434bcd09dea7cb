"""From a row to a prompt and the answer that should follow it.

A template is two format strings over the row's columns, Template("{input} It was", " {output}"), or one of
NAMED,

    alpaca       instruction rows, the text of Stanford Alpaca; the answer follows "### Response:" at once
    plain        instruction rows, nothing but blank lines between the parts
    completion   prompt and completion as they are
    chat         any shape, through the tokenizer's own chat template up to where the assistant begins

or two Jinja templates, Jinja("{% if input is defined %}{{ input }}{% endif %} It was", " {{ output }}"). There a column
that is absent or null is not defined, and to use it is an error.

Both come from the run file only. Format strings may name columns and nothing else. What stands in the data is put in as
it is, so braces in the data mean nothing.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import jinja2
import jinja2.meta
import jinja2.sandbox

from thinwire.data.errors import DataError
from thinwire.data.load import Row

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

JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
)


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


def _columns(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for _, column in _parts(text) if column is not None))


def _fill(text: str, values: dict[str, str]) -> str:
    return "".join(literal + (values[column] if column is not None else "") for literal, column in _parts(text))


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
class Jinja:
    """Jinja templates over a row's columns; DataError for one that cannot be read, and an answer without a column."""

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        _compiled(self.prompt)
        if not _used(self.answer):
            raise DataError(f"the answer template {self.answer!r} uses no column")


@dataclass(frozen=True)
class Chat:
    """The tokenizer's chat template. An instruction row becomes one message of the user."""


NAMED: dict[str, AnyTemplate] = {
    "alpaca": Template(ALPACA, "{output}", ALPACA_BARE),
    "plain": Template("{instruction}\n\n{input}\n\n", "{output}", "{instruction}\n\n"),
    "completion": Template("{prompt}", "{completion}"),
    "chat": Chat(),
}


@dataclass(frozen=True)
class Rendered:
    """A row as text; the model reads prompt + answer with nothing between them."""

    prompt: str
    answer: str


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
        return Rendered(_chat_prompt(row, tokenizer), answer_value(row, template))
    if isinstance(template, Jinja):
        columns = _columns_of(row)
        rendered = Rendered(_jinja(template.prompt, columns, row), _jinja(template.answer, columns, row))
        if not rendered.answer.strip():
            raise row.error("the answer is empty: there is no answer to learn")
        return rendered
    prompt = template.prompt
    if template.bare is not None and (row.fields.get("input") is None or not row.text("input").strip()):
        prompt = template.bare
    answer = {column: row.text(column) for column in _columns(template.answer)}
    if not any(value.strip() for value in answer.values()):
        raise row.error(f"field '{next(iter(answer))}' is empty: there is no answer to learn")
    return Rendered(
        _fill(prompt, {column: row.text(column) for column in _columns(prompt)}),
        _fill(template.answer, answer),
    )


def answer_value(row: Row, template: AnyTemplate) -> str:
    """The bare answer, as the data has it; DataError where it is blank, or made of several columns."""
    column = answer_column(row, template)
    if column == "messages" and isinstance(template, Chat):
        value = messages_of(row)[-1]["content"]
    else:
        value = row.text(column)
    if not value.strip():
        raise row.error(f"field '{column}' is empty: there is no answer to learn")
    return value


def answer_text(template: AnyTemplate, value: str) -> str:
    """The answer of a row whose bare answer is `value`; DataError where answers are made of several columns."""
    if isinstance(template, Chat):
        return value
    column = _answer_column(template)
    if isinstance(template, Template):
        return _fill(template.answer, {column: value})
    return _jinja(template.answer, {column: value}, Row({}, "the answer template", 1))


def answer_column(row: Row, template: AnyTemplate) -> str:
    """The column that holds the row's answer; DataError where the answer is made of several."""
    return row.answer_column() if isinstance(template, Chat) else _answer_column(template)


def references(row: Row, template: AnyTemplate, answer: str) -> tuple[str, ...]:
    """All accepted answers, the space around them cut: the rendered `answer`, then the column `references`."""
    listed = row.fields.get("references")
    if listed is None:
        return (answer.strip(),)
    if not isinstance(listed, list):
        raise row.error("field 'references' is not a list of texts")
    values = [row.as_text(value, f"entry {i} of field 'references'") for i, value in enumerate(listed, 1)]
    single = isinstance(template, Chat) or len(_answer_columns(template)) == 1
    others = [answer_text(template, value) if single else value for value in values]
    return tuple(dict.fromkeys(text.strip() for text in (answer, *others)))


def _chat_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template (other templates: alpaca, plain, completion)")
    match row.answer_column():
        case "messages":
            messages = messages_of(row)[:-1]
        case "completion":
            messages = [{"role": "user", "content": row.text("prompt")}]
        case _:
            parts = [row.text("instruction")]
            if row.fields.get("input") is not None and row.text("input").strip():
                parts.append(row.text("input"))
            messages = [{"role": "user", "content": "\n\n".join(parts)}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:  # raised by templates that want turns to alternate, or no system message
        raise row.error(f"the tokenizer's chat template refuses the row ({error})") from None


def messages_of(row: Row) -> list[dict[str, str]]:
    """The column `messages`, role and content of each; DataError where they do not end with the assistant's."""
    value = row.value("messages")
    if not isinstance(value, list) or len(value) < 2:
        raise row.error("field 'messages' is not a list of at least two messages")
    messages = []
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise row.error(f"message {i} is not an object with 'role' and 'content'")
        content = row.as_text(message["content"], f"the content of message {i}")
        messages.append({"role": message["role"], "content": content})
    if messages[-1]["role"] != "assistant":
        raise row.error(f"the last message is from '{messages[-1]['role']}', not from the assistant")
    return messages


def _answer_column(template: Template | Jinja) -> str:
    columns = _answer_columns(template)
    if len(columns) != 1:
        raise DataError(f"the answer template {template.answer!r} must name one {{column}} here, not {len(columns)}")
    return columns[0]


def _answer_columns(template: Template | Jinja) -> tuple[str, ...]:
    return _columns(template.answer) if isinstance(template, Template) else _used(template.answer)


@functools.lru_cache
def _compiled(text: str) -> jinja2.Template:
    try:
        return JINJA.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the Jinja template {text!r} cannot be read (line {error.lineno}: {error.message})") from None


@functools.lru_cache
def _used(text: str) -> tuple[str, ...]:
    """The columns that a Jinja template uses."""
    _compiled(text)
    return tuple(sorted(jinja2.meta.find_undeclared_variables(JINJA.parse(text)) - set(JINJA.globals)))


def _columns_of(row: Row) -> dict[str, Any]:
    """What a Jinja template sees of a row."""
    return {
        name: row.as_text(value, f"field '{name}'") if isinstance(value, str) else value
        for name, value in row.fields.items()
        if value is not None
    }


def _jinja(text: str, columns: Mapping[str, Any], row: Row) -> str:
    try:
        return _compiled(text).render(columns)
    except jinja2.UndefinedError as error:
        present = ", ".join(columns) or "none"
        raise row.error(f"the Jinja template uses what the row lacks: {error.message} (present: {present})") from None
    except Exception as error:  # whatever filters and operators raise on the row's values
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise row.error(f"the Jinja template fails on the row ({problem})") from None
