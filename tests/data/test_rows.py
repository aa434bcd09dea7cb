"""Files of rows: what is read, and what each complaint names."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from tiny import tiny_rows, write_jsonl

from thinwire.data.errors import DataError
from thinwire.data.rows import Row, present, read_jsonl

GOOD = b'{"a": 1}\n'


def put(folder: Path, content: bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(content)
    return path


def complaint(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    rows = tiny_rows(5)
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    assert read_jsonl(path) == [Row(row.fields, str(path), row.line) for row in rows]


def test_bom_crlf_blank_lines_and_no_final_newline(tmp_path: Path) -> None:
    path = put(tmp_path, b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\r\n   \n{"a": 2}\r\n\n{"a": 3}')
    assert [(row.fields["a"], row.line) for row in read_jsonl(path)] == [("é", 1), (2, 4), (3, 6)]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    # str.splitlines would cut at each of these; JSON allows them unescaped inside a string.
    text = "one\u2028two\u0085three"
    path = put(tmp_path, json.dumps({"a": text}, ensure_ascii=False).encode() + b"\n")
    assert [row.fields["a"] for row in read_jsonl(path)] == [text]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{'a': 1}", "the line is not JSON (Expecting property name enclosed in double quotes, column 2)"),
        (b'{"a": 1} {"a": 2}', "the line is not JSON (Extra data, column 10)"),
        (b"[1]", "the line is a list, not an object (one object a line is expected)"),
        (b"null", "the line is null, not an object (one object a line is expected)"),
        (b'{"a": "\xff"}', "the line is not UTF-8"),
        (b'{"a": ' + b"[" * 200_000 + b"}", "the line is JSON beyond what can be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", "the line is JSON beyond what can be read"),
        (b'{"a": "x", "b": 1, "a": "y"}', "two fields are called 'a'"),
        (b'{"b": {"a": 1, "a": 1}}', "two fields are called 'a'"),
        (
            b"{",
            "the line is not JSON (it ends within an object; one object a line, or one array of them, is expected)",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    path = put(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    assert complaint(path) == f"{path}:3: {problem}"


def test_an_array_of_objects_is_rows(tmp_path: Path) -> None:
    fields = [{"a": "é"}, {"a": [1, None]}, {"a": 2}]
    for text in (json.dumps(fields), json.dumps(fields, indent=2), "\n \n" + json.dumps(fields) + "\n"):
        path = put(tmp_path, text.encode())
        assert read_jsonl(path) == [Row(each, str(path), number) for number, each in enumerate(fields, 1)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[]", "the file holds no row"),
        (b'[{"a": 1}, 2]', "2: entry 2 of the array is a number, not an object (one object a line is expected)"),
        (b'[\n {"a": 1}\n {"a": 2}\n]', "3: the line is not JSON (Expecting ',' delimiter, column 2)"),
        (b'[\n {"a": 1}\n]\n{"a": 2}\n', "4: the line is not JSON (Extra data, column 1)"),
        (b'[\n {"a": "\xff"}\n]', "2: the line is not UTF-8"),
        (b'[\n {"a": 1},\n', "the line is not JSON (it ends within an object;"),
    ],
)
def test_an_array_that_cannot_be_used(tmp_path: Path, content: bytes, problem: str) -> None:
    assert problem in complaint(put(tmp_path, content))


def test_what_is_no_finite_number_is_missing(tmp_path: Path) -> None:
    path = put(tmp_path, b'{"a": NaN, "b": -Infinity, "c": 1e999, "d": [NaN, {"e": Infinity}], "f": 1.5, "g": "nan"}\n')
    (row,) = read_jsonl(path)
    assert row.fields == {"a": None, "b": None, "c": None, "d": [None, {"e": None}], "f": 1.5, "g": "nan"}
    for column in "abc":
        with pytest.raises(DataError, match=f"train.jsonl:1: field '{column}' is null"):
            row.text(column)


def test_missing_under_every_name() -> None:
    missing = [None, float("nan"), float("-inf"), np.float32("nan"), np.datetime64("NaT"), Decimal("NaN")]
    missing += [Decimal("sNaN"), Decimal("Infinity"), pandas.NA, pandas.NaT]
    assert present(missing) == [None] * len(missing)
    assert present({"a": {1: (missing[1], "x")}}) == {"a": {"1": [None, "x"]}}


def test_numbers_of_numpy_are_written_as_pythons() -> None:
    values = [
        np.int64(3),
        np.float64(0.5),
        np.bool_(True),
        np.array([1, 2]),
        np.array(7),
        np.str_("x"),
        Decimal("1.50"),
    ]
    found = present(values)
    assert found == [3, 0.5, True, [1, 2], 7, "x", Decimal("1.50")]
    row = Row({str(i): value for i, value in enumerate(found)}, "x", 1)
    assert [row.text(i) for i in "012456"] == ["3", "0.5", "True", "7", "x", "1.50"]
    assert Row({"a": Decimal("1E+3")}, "x", 1).text("a") == "1000"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Decimal("NaN")])
def test_no_number_is_written_as_text_from_any_row(value: Any) -> None:
    with pytest.raises(DataError, match=r"x:1: field 'a' is .*, not a finite number"):
        Row({"a": value}, "x", 1).text("a")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    assert complaint(missing) == f"{missing}: cannot be read (No such file or directory)"
    assert complaint(tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        path = put(tmp_path, content)
        assert complaint(path) == f"{path}: the file holds no row"


def test_a_column_as_text() -> None:
    fields = {
        "t": "x",
        "i": 3,
        "f": 0.5,
        "b": True,
        "n": None,
        "l": [],
        "o": {},
        "half": "\ud83d",
        "whole": "😀",
    }
    row = Row(fields, "train.jsonl", 17)
    assert [row.text(name) for name in ("t", "i", "f", "b", "whole")] == ["x", "3", "0.5", "True", "😀"]
    for column, problem in (
        ("z", "field 'z' is missing (present: t, i, f, b, n, l, o, half, whole)"),
        ("n", "field 'n' is null"),
        ("l", "field 'l' is a list, not text"),
        ("o", "field 'o' is an object, not text"),
        ("half", "field 'half' holds one half of a surrogate pair"),
    ):
        with pytest.raises(DataError) as caught:
            row.text(column)
        assert str(caught.value) == f"train.jsonl:17: {problem}"
