"""What commands print as JSON, for those who collect logs: an object a line, each with its run, round and site."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from thinwire.data.shown import printable_json
from thinwire.records import Record, finite, visits

FORMS = ("text", "json")


def _known(form: str) -> str:
    if form not in FORMS:
        raise typer.BadParameter(f"{form!r} is none of {', '.join(FORMS)}")
    return form


LogForm = Annotated[
    str, typer.Option("--log", envvar="THINWIRE_LOG", callback=_known, help="Of what is printed: text, or json.")
]


class Journal:
    """Prints events, a line each: time, level, event, message, and `about`, which has run, name, round and site."""

    def __init__(self) -> None:
        self.about: Record = {"run": None, "name": None, "round": None, "site": None}

    def add(self, event: str, message: str, level: str = "info", **fields: Any) -> None:
        """Print an event; on stderr where it is an error."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"time": now, "level": level, "event": event, "message": message, **self.about, **fields}
        typer.echo(printable_json(finite(line), indent=None), err=level == "error")
        sys.stdout.flush()

    def round_ends(self, record: Record) -> None:
        """A line for a round, and one for each reply that did not count."""
        self.about["round"] = record["round"]
        fields: Record = {name: record.get(name) for name in ("bytes_down", "bytes_up", "seconds", "peak_memory_bytes")}
        asked = visits(record)
        lost = [visit for visit in asked if visit.get("error") or visit.get("left_out")]
        loss = (record.get("metrics") or {}).get("loss")
        text = f"round {record['round']}: {len(asked) - len(lost)} of {len(asked)} replies count"
        self.add("round", text, **fields, loss=loss, replies=len(asked) - len(lost), dropped=len(lost))
        for visit in lost:
            name, why = visit.get("name", visit["id"]), visit.get("error") or visit["left_out"]
            self.add("dropped", f"{name}: {why}", "warning", site=name, reason=why)

    def evaluated(self, record: Record) -> None:
        """A line for an evaluation; nothing of rows."""
        scores = {name: value for name, value in record.items() if type(value) in (int, float) and name != "round"}
        at: Record = {"round": record.get("round"), "split": record.get("split")}
        self.add("evaluation", f"after round {record.get('round')}: {record.get('split')}", **at, **scores)

    def record(self, file: str, record: Record) -> None:
        """A line of that file of a run's folder, rounds.jsonl or evals.jsonl."""
        (self.round_ends if file == "rounds.jsonl" else self.evaluated)(record)

    def frames(self, lines: Iterable[str]) -> None:
        """Lines of a site's audit.jsonl: frames that came, and answers that left."""
        for line in lines:
            self._frame(line)

    def _frame(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if type(entry.get("run")) is int:
            self.about["run"] = f"{entry['run']:08x}"
        self.about["round"] = entry.get("round", self.about["round"])
        passed = entry.get("verdict") == "passed"
        fields: Record = {
            name: entry.get(name) for name in ("direction", "action", "method", "kind", "bytes", "verdict")
        }
        text = f"{entry.get('direction')}: {entry.get('action')}, {entry.get('verdict')}"
        self.add("frame", text, "info" if passed else "warning", **fields)


_now: list[Journal] = []


def current() -> Journal | None:
    """The journal that is kept now; None where text is printed."""
    return _now[-1] if _now else None


@contextmanager
def journal(form: str) -> Iterator[None]:
    """Keep a journal while the block lasts, if that is the form."""
    if form != "json":
        yield
        return
    _now.append(Journal())
    try:
        yield
    finally:
        _now.pop()
