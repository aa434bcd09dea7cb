"""Rows from CSV and Parquet files.

A CSV file is UTF-8, with or without a byte order mark, and begins with the names of its columns; every cell is a text.
A cell in double quotes may hold separators, line ends and doubled quotes. The separator is a comma, semicolon or tab:
the one that stands most often in the first line. The line of a row is the one on which it begins.

Of a Parquet file, the "line" of a row is its number, from 1.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from thinwire.data.errors import DataError
from thinwire.data.load import BOM, Row

SEPARATORS = ",;\t"
RAGGED = "{found} cells where the first line names {expected} columns"


def read_csv(path: str | Path) -> list[Row]:
    """The rows of one file, blank lines skipped.

    DataError where the file cannot be read, holds no row or names a column twice, and for a line that is not UTF-8, has
    more or fewer cells than there are columns, or a quote that does not end.
    """
    rows = []
    try:
        with open(path, "rb") as file, _any_length():
            first = file.readline().removeprefix(BOM)
            file.seek(0)
            separator = max(SEPARATORS, key=lambda mark: first.count(mark.encode()))
            columns: list[str] | None = None
            for cells, line in _records(file, str(path), separator):
                if columns is None:
                    columns = [cell.strip() for cell in cells]
                    twice = [name for name, times in Counter(columns).items() if times > 1]
                    if twice:
                        raise DataError(f"{path}:{line}: two columns are called {twice[0]!r}")
                elif len(cells) != len(columns):
                    raise DataError(f"{path}:{line}: {RAGGED.format(found=len(cells), expected=len(columns))}")
                else:
                    rows.append(Row(dict(zip(columns, cells, strict=True)), str(path), line))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not rows:
        raise DataError(f"{path}: the file holds no row")
    return rows


def read_parquet(path: str | Path) -> list[Row]:
    """The rows of one file; DataError where it cannot be read, is no Parquet file or holds no row."""
    import pyarrow
    from pyarrow import parquet

    rows: list[Row] = []
    try:
        with open(path, "rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches():
                rows += [Row(fields, str(path), len(rows) + i) for i, fields in enumerate(batch.to_pylist(), 1)]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: is not a Parquet file that can be read ({problem})") from None
    except OSError as error:  # of the system, or of pyarrow for a page that is damaged
        raise DataError(f"{path}: cannot be read ({error.strerror or str(error).splitlines()[0]})") from None
    if not rows:
        raise DataError(f"{path}: the file holds no row")
    return rows


def _records(file: BinaryIO, source: str, separator: str) -> Iterator[tuple[list[str], int]]:
    """The records that are not blank, each with the line on which it begins."""
    reader = csv.reader(_lines(file, source), delimiter=separator, strict=True)
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


def _lines(file: BinaryIO, source: str) -> Iterator[str]:
    for number, raw in enumerate(file, 1):
        try:
            yield (raw.removeprefix(BOM) if number == 1 else raw).decode()
        except UnicodeDecodeError:
            raise DataError(f"{source}:{number}: the line is not UTF-8") from None


@contextmanager
def _any_length() -> Iterator[None]:
    """A cell may be a whole document; the module's own limit is 128 kB, and one for all of the process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
