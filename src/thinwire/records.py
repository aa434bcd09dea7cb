"""Records: JSON objects in files that every reader of JSON takes, most of them one a line as a run goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def dumps(value: Any, indent: int | None = None) -> str:
    """The value as JSON; a number that is not finite, which JSON lacks, is null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def append(path: Path, record: Record) -> None:
    """Add a line to a file, and have it on the disk."""
    with path.open("a") as file:
        file.write(dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a file that is whole, old or new, whenever it is looked at: flushed, then renamed."""
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_records(path: Path) -> list[Record]:
    """The records of a file of lines, none where there is no file; a line that is none is left out."""
    return [record for _, record in _lines(path) if record is not None]


def rewind(path: Path, round: int, expected: int | None = None) -> list[str]:
    """Drop the records after that round; what people must know of the others, a line each.

    A line that is no record is moved to NAME.damaged; but a last one without its end was being written when the run was
    cut off, and is dropped. `expected`: how many records there were at the end of that round, if that is known.
    """
    notes, lines = [], _lines(path)
    damaged = [line for line, record in lines if record is None]
    if damaged and not damaged[-1].endswith(b"\n") and lines[-1][0] is damaged[-1]:
        damaged.pop()
    kept = [record for _, record in lines if record is not None and record["round"] <= round]
    if damaged:
        aside = path.with_name(path.name + ".damaged")
        with aside.open("ab") as file:
            file.writelines(line.rstrip(b"\n") + b"\n" for line in damaged)
        notes.append(f"{path}: {len(damaged)} damaged line{'s' * (len(damaged) > 1)} moved to {aside.name}")
    if expected is not None and len(kept) < expected:
        notes.append(f"{path}: {expected - len(kept)} of {expected} records are lost")
    replace(path, "".join(dumps(record) + "\n" for record in kept).encode())
    return notes


def _lines(path: Path) -> list[tuple[bytes, Record | None]]:
    """Each line, and the record that it is."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [(line, _record(line)) for line in content.splitlines(keepends=True) if line.strip()]


def _record(line: bytes) -> Record | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and type(found.get("round")) is int else None


def finite(value: Any) -> Any:
    """The value with null for each number that is not finite, as deep as it goes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
