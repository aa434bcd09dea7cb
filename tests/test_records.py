"""What a run's records are when they are written, when they are damaged, and when a run goes back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from thinwire import records
from thinwire.evaluate.splits import Score


def lines(count: int) -> list[dict[str, Any]]:
    return [{"round": round, "loss": 1.5, "name": "café"} for round in range(1, count + 1)]


def written(path: Path, count: int) -> Path:
    for record in lines(count):
        records.append(path, record)
    return path


def refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_wherever_it_stands(value: float) -> None:
    text = records.dumps({"a": value, "b": [1.0, (value,)], "c": {"d": value}})
    assert json.loads(text, parse_constant=refuse) == {"a": None, "b": [1.0, [None]], "c": {"d": None}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "rounds.jsonl", 3)
    assert records.read_records(path) == lines(3)
    assert records.read_records(tmp_path / "none") == []


def test_going_back_drops_what_came_later_and_reports_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "rounds.jsonl", 4)
    assert records.rewind(path, 2, 2) == []
    assert records.read_records(path) == lines(2)
    assert {file.name for file in tmp_path.iterdir()} == {"rounds.jsonl"}


def test_a_line_that_was_cut_off_as_it_was_written_is_nobodys_loss(tmp_path: Path) -> None:
    path = written(tmp_path / "rounds.jsonl", 2)
    with path.open("a") as file:
        file.write('{"round": 3, "lo')
    assert records.rewind(path, 2, 2) == []
    assert records.read_records(path) == lines(2)


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe\x00", b"{", b"[]", b"7", b'{"loss": 1}', b'{"round": "2"}', b"[" * 100_000, b'{"round": 2} {}'],
)
def test_a_damaged_line_is_kept_aside_and_costs_no_other(tmp_path: Path, damage: bytes) -> None:
    path = written(tmp_path / "rounds.jsonl", 3)
    content = path.read_bytes().splitlines()
    content[1] = damage
    path.write_bytes(b"\n".join(content) + b"\n")
    notes = records.rewind(path, 3, 3)
    assert [record["round"] for record in records.read_records(path)] == [1, 3]
    assert (tmp_path / "rounds.jsonl.damaged").read_bytes() == damage + b"\n"
    assert ["1 damaged line moved" in notes[0], "1 of 3 records are lost" in notes[1]] == [True, True]


@pytest.mark.parametrize("content", [b"", None])
def test_a_file_that_is_gone_or_empty_is_reported(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "evals.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert records.rewind(path, 3, 5) == [f"{path}: 5 of 5 records are lost"]
    assert records.rewind(path, 3, None) == []  # a checkpoint of old does not know how many there were


def test_every_score_of_an_evaluation_has_its_scale() -> None:
    """What cards, tables, plots and trackers show is made from it: a score without one would be shown nowhere."""
    assert {field.name for field in dataclasses.fields(Score)} - {"split", "rows"} == set(records.SCORES)
    assert set(records.SCORES) - set(records.MEASURED) == {"perplexity"}
