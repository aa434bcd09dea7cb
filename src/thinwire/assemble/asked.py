"""A line that somebody types, as a row that the run's prompts show."""

from __future__ import annotations

import string
from collections.abc import Sequence

from thinwire.data.jinja import is_rendered, used
from thinwire.data.rows import Row
from thinwire.data.templates import AnyTemplate, Chat, Jinja, answer_columns


def row_of(template: AnyTemplate, line: str, answer: str, talk: Sequence[dict[str, str]] = ()) -> Row:
    """The line in the first column that the run's prompts show; what else they show is left empty."""
    if isinstance(template, Chat):
        turn = [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        return Row({"messages": [*talk, *turn]}, "input", 1)
    answers = dict.fromkeys(answer_columns(template), answer)
    if isinstance(template, Jinja):
        return Row(answers | _shown(template, line), "input", 1)
    first, *rest = _columns(template.prompt) or ["input"]
    return Row({**dict.fromkeys(rest, ""), **answers, first: line}, "input", 1)


def _columns(text: str) -> list[str]:
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(text) if name))


def _shown(template: Jinja, line: str) -> dict[str, str]:
    """The columns of a Jinja prompt: the line in the first that it cannot do without, the others empty or absent."""
    columns = used(template.prompt) or ("input",)
    needed = [name for name in columns if not is_rendered(template.prompt, dict.fromkeys({*columns} - {name}, ""))]
    first = (needed or columns)[0]
    return {**dict.fromkeys(needed, ""), first: line}
