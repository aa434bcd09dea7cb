"""Where a run stands, read from its folder: rounds, clients, bytes, what was dropped and why, and who is at work."""

from __future__ import annotations

import json
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinwire.errors import ConfigError
from thinwire.operations.drops import dropped
from thinwire.operations.folders import holder
from thinwire.records import MEASURED, Record, read_records, visits

SEEN = Path("federation", "seen.json")  # written by the hub: when each site was last connected, or answered
RECENT = 20  # rounds by which the time that is left is estimated


@dataclass(frozen=True)
class Client:
    """A client of a run. `round`: the last one in which its reply counted; `seen`: seconds since 1970, of a site."""

    id: int
    name: str
    replies: int = 0
    dropped: int = 0
    round: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    seen: float | None = None
    connected: bool | None = None
    member: bool = True


@dataclass(frozen=True)
class Drop:
    """A reply that did not count."""

    round: int
    client: str
    kind: str
    reason: str


@dataclass(frozen=True)
class RunStatus:
    """A run. `state`: running, ended, or stopped, with the reason in `why`; a stopped one can go on.

    `left`: seconds to the end by the latest rounds; `scores`: split -> the last evaluation; `pid`: who holds it.
    """

    folder: str
    name: str
    method: str
    state: str
    why: str | None
    pid: int | None
    round: int
    rounds: int
    seconds: float
    left: float | None
    bytes_down: int
    bytes_up: int
    loss: float | None
    scores: dict[str, dict[str, float]]
    changed: float | None  # when the last round ended, seconds since 1970
    clients: list[Client] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    kind: str = "run"

    @property
    def well(self) -> bool:
        """Whether it has ended, or somebody is at work on it."""
        return self.state != "stopped"


def run_status(folder: Path) -> RunStatus:
    """Where the run of a folder stands now; ConfigError for a folder that holds none."""
    settings = _toml(folder / "run.toml")
    records, evals = read_records(folder / "rounds.jsonl"), read_records(folder / "evals.jsonl")
    summary, hub = _json(folder / "summary.json"), _json(folder / "federation" / "status.json")
    pid = holder(folder)
    state = "ended" if summary else "running" if pid is not None else "stopped"
    rounds = int(_number((summary or settings).get("rounds")))
    seconds = [_number(record.get("seconds")) for record in records]
    lately, done = seconds[-RECENT:], records[-1]["round"] if records else 0
    left = sum(lately) / len(lately) * max(0, rounds - done) if lately and state == "running" else None
    scores: dict[str, dict[str, float]] = {}
    for row in evals:
        found = {name: row[name] for name in MEASURED if type(row.get(name)) in (int, float)}
        scores[str(row.get("split"))] = {"round": row["round"], **found}
    path = folder / "rounds.jsonl"
    method = settings.get("method", {})
    return RunStatus(
        folder=str(folder),
        name=str(settings.get("name", folder.name)),
        method=str(method.get("name") or method.get("path", "?")),
        state=state,
        why=(summary.get("ended") if summary else hub.get("error") if state == "stopped" else None),
        pid=pid,
        round=done,
        rounds=rounds,
        seconds=sum(seconds),
        left=left,
        bytes_down=sum(int(_number(record.get("bytes_down"))) for record in records),
        bytes_up=sum(int(_number(record.get("bytes_up"))) for record in records),
        loss=_loss(records[-1]) if records else None,
        scores=scores,
        changed=path.stat().st_mtime if records else None,
        clients=_clients(records, _json(folder / SEEN), settings),
        drops=[
            Drop(record["round"], str(visit.get("name", visit["id"])), *why)
            for record in records
            for visit in visits(record)
            if (why := dropped(visit)) is not None
        ],
    )


def counts(drops: list[Drop]) -> dict[str, int]:
    """Kind -> how many replies were dropped for it, the most frequent first."""
    return dict(Counter(drop.kind for drop in drops).most_common())


def _clients(records: list[Record], seen: dict[str, Any], settings: Record) -> list[Client]:
    named = settings.get("federation", {}).get("sites", [])
    found: dict[int, dict[str, Any]] = {id: {"id": id, "name": name} for id, name in enumerate(named)}
    for record in records:
        for visit in visits(record):
            mine = found.setdefault(visit["id"], {"id": visit["id"]})
            mine["name"] = str(visit.get("name", visit["id"]))
            for way in ("bytes_down", "bytes_up"):
                mine[way] = mine.get(way, 0) + int(_number(visit.get(way)))
            if dropped(visit) is None:
                mine["replies"], mine["round"] = mine.get("replies", 0) + 1, record["round"]
            else:
                mine["dropped"] = mine.get("dropped", 0) + 1
    for id, (name, about) in enumerate(seen.items()):
        mine = found.setdefault(int(about.get("id", id)), {"id": int(about.get("id", id)), "name": name})
        mine |= {key: about[key] for key in ("seen", "connected", "member") if key in about}
    return [Client(**found[id]) for id in sorted(found)]


def _loss(record: Record) -> float | None:
    loss = (record.get("metrics") or {}).get("loss")
    return loss if isinstance(loss, int | float) else None


def _number(value: Any) -> float:
    return value if type(value) in (int, float) else 0


def _toml(path: Path) -> Record:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent}: no run is there") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    """What a file of JSON holds, {} where there is none, or one that is being written."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def ago(then: float | None) -> str:
    """How long ago a time was, for people."""
    from thinwire.units import span

    return "-" if then is None else f"{span(max(0.0, time.time() - then))} ago"
