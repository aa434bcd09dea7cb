"""A row, and rows from JSON: one object a line, or one array of objects.

Three shapes are understood by the named templates, and any other columns may stand beside them:

    {"instruction": ..., "input": ..., "output": ...}         input may be absent or empty
    {"prompt": ..., "completion": ...}
    {"messages": [{"role": ..., "content": ...}, ...]}        the last one from the assistant

`references` (a list of accepted answers) is understood in each. A template of the user's own may read any
column, so a file is not held to a shape here: a missing column is reported by whoever needs it, with the file
and the line. What is missing under another name (NaN, an infinite number, pandas' NaT and NA) is null here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from thinwire.data.content import lines
from thinwire.data.errors import DataError

FORM = "JSON, one object a line"
PLAIN = (str, bool, int)  # what is present as it is
SHAPES = (("messages",), ("prompt", "completion"), ("instruction", "output"))  # of a row, the answer's column last


@dataclass(frozen=True)
class Row:
    """One row as it was read, and where it stood, so that every complaint can name it."""

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
        found = self.fields.get(column)
        if type(found) is str and found.isascii():
            return found
        return self.as_text(self.value(column), f"field '{column}'")

    def as_text(self, value: Any, name: str) -> str:
        """`value` as text; DataError that calls it `name` where it is none, or one that UTF-8 cannot write."""
        if not isinstance(value, str | int | float | Decimal):
            raise self.error(f"{name} is {kind(value)}, not text")
        if isinstance(value, float | Decimal) and present(value) is None:
            raise self.error(f"{name} is {value}, not a finite number")
        text = f"{value:f}" if isinstance(value, Decimal) else str(value)
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


def present(value: Any) -> Any:
    """The value in Python's own types, None for what is missing under any of its names, also within lists and objects.

    Missing are NaN, an infinite number, pandas' NaT and NA. NumPy's scalars and arrays become numbers and lists.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    if isinstance(value, Mapping):
        return {
            str(name): inner if inner is None or type(inner) in PLAIN else present(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [present(inner) for inner in value]
    if isinstance(value, np.datetime64 | np.timedelta64):  # .item() of a nanosecond is a bare number
        return None if np.isnat(value) else value
    if isinstance(value, np.generic | np.ndarray):
        return present(value.tolist())
    return None if type(value).__name__ in ("NaTType", "NAType") else value


def read_jsonl(path: str | Path) -> list[Row]:
    """The rows of one file: UTF-8, with or without a byte order mark, LF, CRLF or CR, blank lines skipped.

    The file holds one object a line, or is one array of objects, whose "lines" are their numbers, from 1. DataError
    where the file cannot be read, is something else or holds no row, and for what is no object.
    """
    rows: list[Row] = []
    held = enumerate(lines(path, FORM), 1)
    for number, raw in held:
        content = raw.strip()
        if content.startswith(b"[") and not rows:
            rest = b"".join(after for _, after in held)
            entries = _parsed(raw + rest, str(path), number)
            rows = [_row(fields, str(path), i, f"entry {i} of the array") for i, fields in enumerate(entries, 1)]
        elif content:
            if not rows and not content.startswith(b"{") and any(mark in content for mark in b",;\t"):
                begin = content[:40].decode(errors="replace")
                raise DataError(f"{path}: begins as a table or plain text does ({begin!r}), not as {FORM}")
            rows.append(_row(_parsed(raw, str(path), number), str(path), number, "the line"))
    if not rows:
        raise DataError(f"{path}: the file holds no row")
    return rows


def _row(fields: Any, source: str, line: int, what: str) -> Row:
    if not isinstance(fields, dict):
        raise DataError(f"{source}:{line}: {what} is {kind(fields)}, not an object (one object a line is expected)")
    return Row(present(fields), source, line)


def _parsed(content: bytes, source: str, line: int) -> Any:
    """What stands in a line, or from that line on."""
    try:
        return DECODER.decode(content.rstrip().decode())
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise DataError(f"{source}:{line}: the line is not UTF-8") from None
    except json.JSONDecodeError as error:
        problem = f"{error.msg}, column {error.colno}"
        if error.pos >= len(error.doc):
            problem = "it ends within an object; one object a line, or one array of them, is expected"
        raise DataError(f"{source}:{line + error.lineno - 1}: the line is not JSON ({problem})") from None
    except KeyError as error:
        raise DataError(f"{source}:{line}: two fields are called {error.args[0]!r}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, or thousands of brackets
        raise DataError(f"{source}:{line}: the line is JSON beyond what can be read") from None


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object; KeyError for a name that comes twice, of which the json module keeps the last without a word."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
