"""Rows on their way to the sites of a federation on one machine: what a site reads is what a run has."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from thinwire.data.rows import Row
from thinwire.data.source import read_file
from thinwire.federation.local import write_rows

DAY = datetime.date(2024, 1, 2)
BESIDE = {
    "date": DAY,
    "stamp": datetime.datetime(2024, 1, 2, 3, 4, 5, 6),
    "zone": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "time": datetime.time(3, 4),
    "span": datetime.timedelta(days=1, seconds=2),
    "price": Decimal("1.50"),
    "raw": b"\x00\xff",
    "picture": {"bytes": b"x", "path": None},
    "days": [DAY, None],
    "tree": {"at": {"day": DAY}, "n": [1, 2]},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_a_site_reads_what_stood_in_a_parquet_file(tmp_path: Path, beside: str) -> None:
    fields = [{"instruction": f"Say {i}.", "output": f"é {i}", beside: BESIDE[beside]} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(fields), tmp_path / "rows.parquet")
    rows = read_file(tmp_path / "rows.parquet")
    assert [row.fields for row in rows] == fields
    path = write_rows(tmp_path / "site" / "data", rows)
    assert path.parent == tmp_path / "site"
    found = read_file(path)
    assert [row.fields for row in found] == fields
    assert [row.line for row in found] == [1, 2, 3]


def test_plain_rows_are_lines_of_json(tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [{"a": "é\n\u2028"}, {"a": 1, "b": [None, {"c": True}]}]
    path = write_rows(tmp_path / "data", [Row(each, "x", 1) for each in fields])
    assert path == tmp_path / "data.jsonl"
    assert [row.fields for row in read_file(path)] == fields


def test_rows_of_two_kinds_of_file_go_together(tmp_path: Path) -> None:
    rows = [Row({"a": "x", "when": DAY}, "x.parquet", 1), Row({"a": "y", "when": "today"}, "y.jsonl", 1)]
    found = [row.fields for row in read_file(write_rows(tmp_path / "data", rows))]
    assert found == [{"a": "x", "when": "2024-01-02"}, {"a": "y", "when": "today"}]
