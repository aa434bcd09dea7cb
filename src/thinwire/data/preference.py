"""Rows with an answer that was chosen and one that was rejected, as two rows of a shape that templates take.

    {"prompt": ..., "chosen": ..., "rejected": ...}         all texts
    {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}    the last of each from the assistant
    {"chosen": [messages], "rejected": [messages]}          whole talks, alike but for their last message

as in the preference format of Hugging Face. A template of the user's own reads any columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thinwire.data import templates
from thinwire.data.rows import Row
from thinwire.data.templates import AnyTemplate, Chat

SIDES = ("chosen", "rejected")


def sides(row: Row, template: AnyTemplate) -> tuple[Row, Row]:
    """The row with its chosen answer, and with its rejected one; DataError where it lacks one of them."""
    chosen, rejected = (_side(row, name, template) for name in SIDES)
    return chosen, rejected


def _side(row: Row, name: str, template: AnyTemplate) -> Row:
    fields = {column: value for column, value in row.fields.items() if column not in (*SIDES, "messages")}
    value = row.value(name)
    if isinstance(template, Chat) and (isinstance(value, list) or isinstance(fields.get("prompt"), list)):
        return Row({**fields, "messages": _talk(row, name, value)}, row.source, row.line)
    answer = row.text(name)
    if not answer.strip():
        raise row.error(f"field '{name}' is empty: there is no answer to learn")
    if isinstance(template, Chat):
        column = "output" if row.has("instruction") else "completion"
        row.text("instruction" if row.has("instruction") else "prompt")  # missing, it is named among the row's own
    else:
        column = templates.answer_column(row, template)
    return Row({**fields, column: answer}, row.source, row.line)


def _talk(row: Row, name: str, value: Any) -> list[Any]:
    """All messages up to the answer, which follow the prompt unless they begin before an answer themselves."""
    answer = value if isinstance(value, list) else [{"role": "assistant", "content": row.text(name)}]
    if not answer:
        raise row.error(f"field '{name}' is an empty list: there is no answer to learn")
    first = answer[0].get("role") if isinstance(answer[0], Mapping) else None
    if first != "assistant":
        return answer
    asked = row.value("prompt")
    return [*(asked if isinstance(asked, list) else [{"role": "user", "content": row.text("prompt")}]), *answer]
