"""CSV and Parquet: what was written is read back, and each complaint names the line."""

from __future__ import annotations

import csv
import datetime
import io
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from thinwire.data.errors import DataError
from thinwire.data.tabular import read_arrow, read_csv, read_parquet

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)


def put(folder: Path, content: bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def complaint(path: Path) -> str:
    read = read_parquet if path.suffix == ".parquet" else read_csv
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(
    st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELL, min_size=width, max_size=width), min_size=1)),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_any_table_is_read_back_with_its_lines(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]], separator: str, end: str, bom: bool
) -> None:
    out = io.StringIO()
    names = [f"column {i}" for i in range(len(cells[0]))]
    lines = []
    for row in [names, *cells]:
        lines.append(out.getvalue().count("\n") + 1)
        csv.writer(out, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL).writerow(row)
    content = (b"\xef\xbb\xbf" if bom else b"") + out.getvalue().encode()
    path = put(tmp_path_factory.mktemp("csv"), content)
    assert [(dict(row.fields), row.line) for row in read_csv(path)] == [
        (dict(zip(names, row, strict=True)), line) for row, line in zip(cells, lines[1:], strict=True)
    ]


def test_the_separator_is_the_one_of_the_first_line(tmp_path: Path) -> None:
    for content in (b"a,b\n1;2,3\n", b"a;b\n1;2,3\n", b"a\tb\n1;2\t3,4;5\n"):
        row = read_csv(put(tmp_path, content))[0]
        assert list(row.fields) == ["a", "b"]
    assert dict(row.fields) == {"a": "1;2", "b": "3,4;5"}


def test_a_text_may_run_over_lines_and_be_long(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = put(tmp_path, b'a,b\n"one\ntwo, ""three""",x\n\n' + b"y" * 200_000 + b",z\n")
    rows = read_csv(path)
    assert [row.line for row in rows] == [2, 5]
    assert rows[0].fields == {"a": 'one\ntwo, "three"', "b": "x"}
    assert len(rows[1].fields["a"]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        (b'a,b\n"1\n1",2\n3\n', 4, "1 cells where the first line names 2 columns"),
        (b"a,b\n1,2\n3,4,5\n", 3, "3 cells where the first line names 2 columns"),
        (b"a,b\n\xff,2\n", 2, "the line is not UTF-8"),
        (b'a,b\n1,2\n3,"4\n5,6\n', 3, "a quote does not end"),
        (b'a,b\n"1"2,3\n', 2, "the line is not CSV (',' expected after '\"')"),
        (b"a,b, a\n1,2,3\n", 1, "two columns are called 'a'"),
        (b"a,b\n1,2\n3,4\x005\n", 3, "the line holds a byte of zero, so it is no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, line: int, problem: str) -> None:
    path = put(tmp_path, content)
    assert complaint(path) == f"{path}:{line}: {problem}"


def test_files_without_a_row(tmp_path: Path) -> None:
    for content in (b"", b"a,b\n", b"a,b\n\n\r\n"):
        path = put(tmp_path, content)
        assert complaint(path) == f"{path}: the file holds no row"
    empty = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), empty)
    assert complaint(empty) == f"{empty}: the file holds no row"
    for name in ("none.csv", "none.parquet"):
        assert complaint(tmp_path / name) == f"{tmp_path / name}: cannot be read (No such file or directory)"


def test_parquet_rows_are_numbered_through_all_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    answers = [f"answer {i}" for i in range(25)]
    table = pyarrow.table({"n": range(25), "output": answers, "references": [[a, a] for a in answers]})
    parquet.write_table(table, path, row_group_size=7)
    rows = read_parquet(path)
    assert [row.line for row in rows] == list(range(1, 26))
    assert [row.text("output") for row in rows] == answers
    assert rows[3].text("n") == "3"
    assert rows[3].value("references") == ["answer 3", "answer 3"]


def test_parquet_values_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"when": [datetime.date(2024, 1, 2)], "none": [None]}), path)
    (row,) = read_parquet(path)
    for column, problem in (("when", "field 'when' is date, not text"), ("none", "field 'none' is null")):
        with pytest.raises(DataError) as caught:
            row.text(column)
        assert str(caught.value) == f"{path}:1: {problem}"


def test_parquet_and_arrow_numbers_that_are_none_are_missing(tmp_path: Path) -> None:
    nan = float("nan")
    table = pyarrow.table({"a": [nan, 1.5], "b": [None, 2], "c": [[nan, 1.0], None]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as file:
        file.write_table(table)
    for rows in (read_parquet(tmp_path / "rows.parquet"), read_arrow(tmp_path / "rows.arrow")):
        assert [row.fields for row in rows] == [
            {"a": None, "b": None, "c": [None, 1.0]},
            {"a": 1.5, "b": 2, "c": None},
        ]
        assert rows[0].line == 1


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "page"])
def test_a_parquet_file_that_is_none(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"a": [f"text {i}" for i in range(2000)]}), path)
    whole = path.read_bytes()
    content = {
        "text": b"a,b\n1,2\n",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "page": whole[:8] + bytes(64) + whole[72:],
    }
    path.write_bytes(content[damage])
    assert complaint(path).startswith(f"{path}: ")
