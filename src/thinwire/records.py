"""Records: JSON objects in files that every reader of JSON takes, most of them one a line as a run goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from thinwire import files
from thinwire.errors import Damaged, first_wrong

Record = dict[str, Any]
SELECTION = "selection"  # the split by which a round may be chosen, and which no summary reports
K = TypeVar("K")


class Scale(NamedTuple):
    """How a score of held-out rows is read: its title, unit, what it is, how a line of progress writes it."""

    title: str
    unit: str
    about: str
    form: str
    derived: bool = False  # holds what another score holds


SCORES = {
    "loss": Scale("loss", "nats a token", "Mean negative log-likelihood of the answers; less is better.", ".4f"),
    "perplexity": Scale("perplexity", "exp of nats a token", "The loss as exp(loss); less is better.", ".3f", True),
    "accuracy": Scale(
        "accuracy", "share of rows", "Share of rows whose right answer is the likeliest; more is better.", ".3f"
    ),
    "recall_10": Scale(
        "recall@10",
        "share of rows",
        "Share of anchors whose positive is among the ten nearest; more is better.",
        ".3f",
    ),
    "mrr": Scale("MRR", "0 to 1", "Mean of one over the rank of an anchor's positive; more is better.", ".3f"),
    "rouge_l": Scale(
        "Rouge-L", "F1, 0 to 1", "Longest common subsequence with the expected answer; more is better.", ".3f"
    ),
    "bleu": Scale("BLEU", "0 to 100", "BLEU of all generated answers together; more is better.", ".1f"),
    "exact_match": Scale(
        "exact match", "share of rows", "Share of generated answers that are an expected one; more is better.", ".3f"
    ),
}
MEASURED = {name: score for name, score in SCORES.items() if not score.derived}


def dumps(value: Any, indent: int | None = None) -> str:
    """The value as JSON; a number that is not finite, which JSON lacks, is null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def append(path: Path, record: Record) -> None:
    """Add a line to a file, and have it on the disk."""
    with path.open("a") as file:
        file.write(dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[Record]:
    """The records of a file of lines, none where there is no file; a line that is none is left out."""
    return [record for _, record in lines(path) if isinstance(record, dict)]


def visits(record: Record) -> list[Record]:
    """The visits of a round's record, those that are whole: a file may have been changed by hand."""
    found = record.get("clients")
    return [v for v in found if isinstance(v, dict) and type(v.get("id")) is int] if isinstance(found, list) else []


def rewind(path: Path, round: int, expected: int | None = None) -> list[str]:
    """Drop the records after that round; what people must know of the others, a line each.

    A line that is no record is moved to NAME.damaged; but a last one without its end was being written when the run was
    cut off, and is dropped. `expected`: how many records there were at the end of that round, if that is known.
    """
    notes, found = [], lines(path)
    damaged = [line for line, record in found if isinstance(record, str)]
    if damaged and not damaged[-1].endswith(b"\n") and found[-1][0] is damaged[-1]:
        damaged.pop()
    kept = [record for _, record in found if isinstance(record, dict) and record["round"] <= round]
    if damaged:
        aside = path.with_name(path.name + ".damaged")
        with aside.open("ab") as file:
            file.writelines(line.rstrip(b"\n") + b"\n" for line in damaged)
        notes.append(f"{path}: {len(damaged)} damaged line{'s' * (len(damaged) > 1)} moved to {aside.name}")
    if expected is not None and len(kept) < expected:
        notes.append(f"{path}: {expected - len(kept)} of {expected} records are lost")
    files.write(path, "".join(dumps(record) + "\n" for record in kept))
    return notes


def lines(path: Path) -> list[tuple[bytes, Record | str]]:
    """Each line that is not blank, and the record that it is, or why it is none; nothing where there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [(line, _record(line)) for line in content.splitlines(keepends=True) if line.strip()]


def _record(line: bytes) -> Record | str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    whole = isinstance(found, dict) and type(found.get("round")) is int
    return found if whole else "not a record of a round"


def finite(value: Any) -> Any:
    """The value with null for each number that is not finite, as deep as it goes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_json(kind: type[K], path: Path) -> K:
    """A file of JSON as that type; Damaged for another."""
    from pydantic import TypeAdapter, ValidationError  # not for `thinwire --help`

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise Damaged(f"{path}: not as it was written: {first_wrong(error)}") from None
