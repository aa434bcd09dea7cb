"""Prompts and answers as Jinja templates of the user's own, over a row's columns; they are sandboxed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from thinwire.data.errors import DataError
from thinwire.data.rows import Row

JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
)
del JINJA.filters["random"], JINJA.globals["lipsum"]  # the same rows are the same prompts


@dataclass(frozen=True)
class Jinja:
    """Jinja templates over a row's columns; DataError for one that cannot be read, and an answer without a column."""

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        _compiled(self.prompt)
        if not used(self.answer):
            raise DataError(f"the answer template {self.answer!r} uses no column")


@functools.lru_cache
def used(text: str) -> tuple[str, ...]:
    """The columns that a Jinja template uses, in the order of their first use."""
    _compiled(text)
    tree = JINJA.parse(text)
    columns = jinja2.meta.find_undeclared_variables(tree) - set(JINJA.globals)
    return tuple(dict.fromkeys(node.name for node in tree.find_all(jinja2.nodes.Name) if node.name in columns))


def columns_of(row: Row) -> dict[str, Any]:
    """What a Jinja template sees of a row."""
    return {
        name: row.as_text(value, f"field '{name}'") if isinstance(value, str) else value
        for name, value in row.fields.items()
        if value is not None
    }


def fill(text: str, columns: Mapping[str, Any], row: Row) -> str:
    """The template over the columns; DataError about the row where it uses what is not there, or fails."""
    try:
        return _compiled(text).render(columns)
    except jinja2.UndefinedError as error:
        present = ", ".join(columns) or "none"
        raise row.error(f"the Jinja template uses what the row lacks: {error.message} (present: {present})") from None
    except Exception as error:  # whatever filters and operators raise on the row's values
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise row.error(f"the Jinja template fails on the row ({problem})") from None


def is_rendered(text: str, columns: Mapping[str, Any]) -> bool:
    """Whether the template does with these columns."""
    try:
        fill(text, columns, Row(columns, "the template", 1))
    except DataError:
        return False
    return True


@functools.lru_cache
def _compiled(text: str) -> jinja2.Template:
    try:
        return JINJA.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the Jinja template {text!r} cannot be read (line {error.lineno}: {error.message})") from None
