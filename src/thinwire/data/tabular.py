"""Rows from CSV, Parquet and Arrow files.

A CSV file is UTF-8, with or without a byte order mark, and begins with the names of its columns; every cell is a text.
A cell in double quotes may hold separators, line ends and doubled quotes. The separator is a comma, semicolon or tab:
the one that stands most often in the first line. The line of a row is the one on which it begins.

Of a Parquet or Arrow file, the "line" of a row is its number, from 1.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO, FileIO
from itertools import chain
from pathlib import Path
from typing import Any

from thinwire.data.content import ARROW, PARQUET, lines, opened
from thinwire.data.errors import DataError
from thinwire.data.rows import FORM, Row, present

TABLE = "a CSV file"
SEPARATORS = ",;\t"
RAGGED = "{found} cells where the first line names {expected} columns"


def read_csv(path: str | Path) -> list[Row]:
    """The rows of one file, blank lines skipped.

    DataError where the file cannot be read, holds no row or names a column twice, and for a line that is not UTF-8, has
    more or fewer cells than there are columns, or a quote that does not end.
    """
    rows, source = [], str(path)
    held = lines(path, TABLE)
    first = next(held, b"")
    if first.lstrip()[:1] in (b"{", b"["):
        _check_json(first, source)
    separator = max(SEPARATORS, key=lambda mark: first.count(mark.encode()))
    columns: list[str] | None = None
    with _any_length():
        for cells, line in _records(_texts(chain([first], held), source), source, separator):
            if columns is None:
                columns = [cell.strip() for cell in cells]
                twice = [name for name, times in Counter(columns).items() if times > 1]
                if twice:
                    raise DataError(f"{path}:{line}: two columns are called {twice[0]!r}")
            elif len(cells) != len(columns):
                raise DataError(f"{path}:{line}: {RAGGED.format(found=len(cells), expected=len(columns))}")
            else:
                rows.append(Row(dict(zip(columns, cells, strict=True)), source, line))
    if not rows:
        raise DataError(f"{path}: the file holds no row")
    return rows


def read_parquet(path: str | Path) -> list[Row]:
    """The rows of one file; DataError where it cannot be read, is no Parquet file or holds no row."""
    from pyarrow import parquet

    return _columnar(path, PARQUET, lambda file: parquet.ParquetFile(file).iter_batches())


def read_arrow(path: str | Path) -> list[Row]:
    """The rows of one file, a stream or with a footer (Feather); DataError as read_parquet."""
    from pyarrow import ipc

    def batches(file: Any) -> Iterable[Any]:
        if file.read(6) == b"ARROW1":
            reader = ipc.open_file(file)
            return (reader.get_batch(i) for i in range(reader.num_record_batches))
        file.seek(0)
        stream: Iterable[Any] = ipc.open_stream(file)
        return stream

    return _columnar(path, ARROW, batches)


def _columnar(path: str | Path, form: str, batches: Callable[[Any], Iterable[Any]]) -> list[Row]:
    import pyarrow

    rows: list[Row] = []
    try:
        with opened(path, form) as file:
            plain = isinstance(file.raw, FileIO)  # what is compressed cannot be read from its end
            for batch in batches(file if plain else BytesIO(file.read())):
                values = map(present, batch.to_pylist())
                rows += [Row(fields, str(path), len(rows) + i) for i, fields in enumerate(values, 1)]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: is not {form} that can be read ({problem})") from None
    if not rows:
        raise DataError(f"{path}: the file holds no row")
    return rows


def _records(texts: Iterable[str], source: str, separator: str) -> Iterator[tuple[list[str], int]]:
    """The records that are not blank, each with the line on which it begins."""
    reader = csv.reader(texts, delimiter=separator, strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = "a quote does not end" if "unexpected end" in str(error) else f"the line is not CSV ({error})"
            raise DataError(f"{source}:{begins}: {problem}") from None
        if cells:
            yield cells, begins


def _texts(held: Iterable[bytes], source: str) -> Iterator[str]:
    for number, raw in enumerate(held, 1):
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise DataError(f"{source}:{number}: the line is not UTF-8") from None
        if "\0" in text:
            raise DataError(f"{source}:{number}: the line holds a byte of zero, so it is no text")
        yield text


def _check_json(first: bytes, source: str) -> None:
    """Refuse JSON under the name of a table."""
    try:
        found: Any = json.loads(first)
    except (ValueError, RecursionError):
        found = first.strip() in (b"{", b"[") or None
    if found is not None:
        raise DataError(f"{source}: is {FORM}, or one array of them, not {TABLE} (name it .jsonl or .json)")


@contextmanager
def _any_length() -> Iterator[None]:
    """A cell may be a whole document; the module's own limit is 128 kB, and one for all of the process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
