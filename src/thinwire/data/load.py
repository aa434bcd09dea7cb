"""A row, and rows from JSONL files: one JSON object a line.

Three shapes are understood by the named templates, and any other columns may stand beside them:

    {"instruction": ..., "input": ..., "output": ...}         input may be absent or empty
    {"prompt": ..., "completion": ...}
    {"messages": [{"role": ..., "content": ...}, ...]}        the last one from the assistant

`references` (a list of accepted answers) is understood in each. A template of the user's own may read any
column, so a file is not held to a shape here: a missing column is reported by whoever needs it, with the file
and the line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.data.errors import DataError

BOM = b"\xef\xbb\xbf"
SHAPES = (("messages",), ("prompt", "completion"), ("instruction", "output"))  # of a row, the answer's column last


@dataclass(frozen=True)
class Row:
    """One row as it was read, and where it stood, so that every complaint can say so."""

    fields: Mapping[str, Any]
    source: str
    line: int

    def error(self, problem: str) -> DataError:
        """The error to raise about this row."""
        return DataError(f"{self.source}:{self.line}: {problem}")

    def value(self, column: str) -> Any:
        """What stands in `column`; DataError where it is missing or null."""
        if column not in self.fields:
            raise self.error(f"field '{column}' is missing (present: {', '.join(self.fields) or 'none'})")
        value = self.fields[column]
        if value is None:
            raise self.error(f"field '{column}' is null")
        return value

    def text(self, column: str) -> str:
        """The text in `column`, numbers written out; DataError where it is missing or no text."""
        return self.as_text(self.value(column), f"field '{column}'")

    def as_text(self, value: Any, name: str) -> str:
        """`value` as text; DataError that calls it `name` where it is none, or one that UTF-8 cannot write."""
        if not isinstance(value, str | int | float):
            raise self.error(f"{name} is {kind(value)}, not text")
        text = str(value)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON's \ud83d alone: Python takes it, tokenizers do not
                raise self.error(f"{name} holds one half of a surrogate pair") from None
        return text

    def has(self, column: str) -> bool:
        """Whether a value stands in `column`: not null or NaN, as tables fill gaps, no blank text and no empty list."""
        value = self.fields.get(column)
        if isinstance(value, str):
            return bool(value.strip())
        return value is not None and value == value and value != []

    def answer_column(self) -> str:
        """The column that holds this row's answer, by the row's shape: of several shapes, the first that has values."""
        full = (answer for *others, answer in SHAPES if self.has(answer) and all(map(self.has, others)))
        answers = [answer for *_, answer in SHAPES]
        found = (*full, *filter(self.has, answers), *filter(self.fields.__contains__, answers), "output")
        return found[0]


def kind(value: Any) -> str:
    """What JSON calls a value, with its article."""
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def read_jsonl(path: str | Path) -> list[Row]:
    """The rows of one file: UTF-8, with or without a byte order mark, LF or CRLF, blank lines skipped.

    DataError where the file cannot be read or holds no row, and for a line that is not a JSON object.
    """
    rows = []
    try:
        with open(path, "rb") as file:
            # Bytes, not text: only b"\n" ends a line then, and one that is not UTF-8 is known by its number.
            for number, raw in enumerate(file, 1):
                content = raw.removeprefix(BOM) if number == 1 else raw
                if content.strip():
                    rows.append(_parse(content, str(path), number))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not rows:
        raise DataError(f"{path}: the file holds no row")
    return rows


def _parse(content: bytes, source: str, line: int) -> Row:
    try:
        fields = json.loads(content.decode())
    except UnicodeDecodeError:
        raise DataError(f"{source}:{line}: the line is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{source}:{line}: the line is not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, or thousands of brackets
        raise DataError(f"{source}:{line}: the line is JSON beyond what can be read") from None
    if not isinstance(fields, dict):
        raise DataError(f"{source}:{line}: the line is {kind(fields)}, not an object (one object a line is expected)")
    return Row(fields, source, line)
