"""Where a site stands, read from its folder: what it was asked, answered and refused, and whether it is at work."""

from __future__ import annotations

import calendar
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinwire.errors import ConfigError
from thinwire.operations.folders import holder


@dataclass(frozen=True)
class Served:
    """A run that the site was asked in. `rounds`: of training that it has answered; `round`: the last of them."""

    run: str
    method: str
    round: int | None
    rounds: int
    evaluations: int
    bytes_in: int
    bytes_out: int
    refused: dict[str, int]  # verdict -> how often
    seen: float | None  # when the last frame came or went, seconds since 1970


@dataclass(frozen=True)
class SiteStatus:
    """A site. `state`: running or stopped; `seen`: when the server last asked; `asked`: a visit is under way."""

    folder: str
    name: str
    state: str
    pid: int | None
    seen: float | None
    asked: bool
    rows: str
    runs: list[Served] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    kind: str = "site"

    @property
    def well(self) -> bool:
        """Whether somebody is at work on it."""
        return self.state == "running"


def site_status(folder: Path) -> SiteStatus:
    """Where the site of a folder stands now; ConfigError for a folder that holds none."""
    try:
        site = json.loads((folder / "site.json").read_bytes())
    except (OSError, ValueError):
        raise ConfigError(f"{folder}: no site is there") from None
    entries = list(_entries(folder / "audit.jsonl"))
    runs: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if type(entry.get("run")) is int:
            runs.setdefault(f"{entry['run']:08x}", []).append(entry)
    last = entries[-1] if entries else {}
    pid, notices = holder(folder), folder / "notices.txt"
    return SiteStatus(
        folder=str(folder),
        name=str(site.get("name", folder.name)),
        state="stopped" if pid is None else "running",
        pid=pid,
        seen=_time(last),
        asked=pid is not None and last.get("direction") == "in" and last.get("verdict") == "passed",
        rows=str(site.get("data", "")),
        runs=[_served(run, found) for run, found in runs.items()],
        notices=notices.read_text(errors="replace").splitlines()[-3:] if notices.is_file() else [],
    )


def _served(run: str, entries: list[dict[str, Any]]) -> Served:
    answers: dict[str, set[int]] = {"train": set(), "evaluate": set()}
    refused: Counter[str] = Counter()
    bytes_in = bytes_out = 0
    for entry in entries:
        passed, out = entry.get("verdict") == "passed", entry.get("direction") == "out"
        if passed and out:
            answers.setdefault(str(entry.get("action")), set()).add(entry.get("round", 0))
        if not passed:
            refused[str(entry.get("verdict"))] += 1
        elif out:
            bytes_out += entry.get("bytes", 0)
        else:
            bytes_in += entry.get("bytes", 0)
    trained = answers["train"]
    return Served(
        run=run,
        method=next((str(entry["method"]) for entry in reversed(entries) if entry.get("method")), "?"),
        round=max(trained, default=None),
        rounds=len(trained),
        evaluations=len(answers["evaluate"]),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        refused=dict(refused.most_common()),
        seen=_time(entries[-1]),
    )


def _entries(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off, or being written
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _time(entry: dict[str, Any]) -> float | None:
    try:
        return float(calendar.timegm(time.strptime(str(entry.get("time")), "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None
