"""What run folders hold: settings, rounds, evaluations and totals, as they were recorded."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.data.errors import DataError
from thinwire.errors import Damaged
from thinwire.records import Record, lines, read_json
from thinwire.report.sites import Matrix


@dataclass(frozen=True)
class Recorded:
    """One run. `group` is its name, which runs that differ by their seed alone share; `label` is its own.

    `after` has for each round the (bytes, seconds) that had passed at its end, evaluations left out. `cost` is what
    was measured with a process for either side, where that lies beside the run; `contributions` what the clients'
    replies were worth, where that was measured, `cross` how what each has learnt scores at each.
    """

    label: str
    group: str
    folder: Path
    settings: Record
    rounds: Sequence[Record]
    evals: Sequence[Record]
    summary: Record | None
    cost: Record | None
    after: dict[int, tuple[int, float]]
    contributions: Record | None = None
    cross: Matrix | None = None

    @property
    def method(self) -> str:
        """The method's name; of a user's own, its class."""
        table = self.settings.get("method", {})
        return str(table.get("name") or str(table.get("path", "?")).rpartition(":")[2])

    def ends(self, split: str) -> tuple[Record, Record] | None:
        """The first and the last evaluation of a split."""
        found = [row for row in self.evals if row.get("split") == split]
        return (found[0], found[-1]) if found else None


def collect(paths: Sequence[Path]) -> list[Recorded]:
    """The runs in these folders and below them, those that tune a rate left out; raises DataError."""
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path}: not a folder")
        found = [path] if _is_run(path) else sorted(p.parent for p in path.rglob("run.toml") if _is_run(p.parent))
        found = [folder for folder in found if folder == path or "tune" not in folder.relative_to(path).parts]
        if not found:
            raise DataError(f"{path}: holds no run (a folder with run.toml and rounds.jsonl or evals.jsonl)")
        folders.update(dict.fromkeys(found))
    trees = {folder: _toml(folder / "run.toml") for folder in folders}
    return [_read(folder, trees[folder], label) for folder, label in zip(trees, _labels(trees), strict=True)]


def records(path: Path) -> list[Record]:
    """The records in a .jsonl file; a last line that was cut off is left out. DataError for another."""
    found = lines(path)
    if found and isinstance(found[-1][1], str) and not found[-1][0].endswith(b"\n"):
        found.pop()
    for number, (_, record) in enumerate(found, 1):
        if isinstance(record, str):
            raise DataError(f"{path}:{number}: {record}")
    return [record for _, record in found if isinstance(record, dict)]


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) else None


def _is_run(folder: Path) -> bool:
    return (folder / "run.toml").exists() and any((folder / f"{n}.jsonl").exists() for n in ("rounds", "evals"))


def _read(folder: Path, settings: Record, label: str) -> Recorded:
    rounds, evals = records(folder / "rounds.jsonl"), records(folder / "evals.jsonl")
    sent, passed = 0, 0.0
    after = {0: (0, 0.0)}
    for record in rounds:
        try:
            sent += record["bytes_down"] + record["bytes_up"]
            passed += record["seconds"]
            record["clients"], record["metrics"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / 'rounds.jsonl'}: round {record['round']} lacks {error}") from None
        after[record["round"]] = (sent, passed)
    beside = (folder / "cost.json", folder.parent.parent / "cost" / "cost.json")  # as `compare` lays it out
    cost = next((_json(file) for file in beside if file.exists()), None)
    summary = _json(folder / "summary.json") if (folder / "summary.json").exists() else None
    worth = _json(folder / "contributions.json") if (folder / "contributions.json").exists() else None
    try:
        cross = read_json(Matrix, folder / "cross.json") if (folder / "cross.json").exists() else None
    except Damaged as error:
        raise DataError(str(error)) from None
    name = str(settings.get("name", folder.name))
    return Recorded(label, name, folder, settings, rounds, evals, summary, cost, after, worth, cross)


def _labels(trees: dict[Path, Record]) -> list[str]:
    """Names; with the seed where a name comes twice, and with the folder where that does not distinguish them."""
    forms: tuple[Callable[[Path, Record], str], ...] = (
        lambda path, tree: str(tree.get("name", path.name)),
        lambda path, tree: f"{tree.get('name', path.name)}, seed {tree.get('seed', 0)}",
        lambda path, tree: f"{tree.get('name', path.name)}, {path.parent.name}/{path.name}",
        lambda path, tree: str(path),
    )
    for form in forms:
        labels = [form(path, tree) for path, tree in trees.items()]
        if len(set(labels)) == len(labels):
            break
    return labels


def _toml(path: Path) -> Record:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not TOML: {error}") from None


def _json(path: Path) -> Record:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path}: not JSON") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not an object")
    return found
