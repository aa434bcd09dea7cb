"""What the terminal shows: progress while a run goes on, tables after it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from thinwire import config
from thinwire.commands.journal import Journal, current
from thinwire.commands.screen import Screen
from thinwire.config import Run, method_name
from thinwire.privacy.released import in_words
from thinwire.records import MEASURED, SCORES, Record, read_records
from thinwire.report.sites import clients_of
from thinwire.runtime.course import Watch
from thinwire.units import bars, number, share, size, span

if TYPE_CHECKING:
    from thinwire.assemble import Rows
    from thinwire.model.net import Net

LISTED = 50  # clients that a line names


class Live(Watch):
    """A line that moves on a terminal, and one line a round anywhere."""

    def __init__(self, run: Run, rows: Rows, net: Net, folder: Path, resume: bool = False) -> None:
        self.console = Screen()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} clients"),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.note, self.rounds = "", run.rounds
        self.sent, self.scored = 0, ""  # bytes so far; the last score
        held = sum(len(rows) for rows in rows.clients.values())
        self.console.print(f"{run.name}: {method_name(run.method)} on {run.model.path}", soft_wrap=True)
        what = run.model.view.trains.format(number(net.size))
        self.console.print(f"  {what} are trained, over {_many(run.rounds, 'round')}")
        if stays := run.model.view.keep:
            self.console.print(f"  beside them what is called {', '.join(stays)}, which stays at each client")
        who = f": {_listed(list(rows.clients))}" if run.data.partition == "files" else ""
        many = _many(len(rows.clients), "client")
        self.console.print(f"  {_many(held, 'row')} stay where they are, with {many}{who}", soft_wrap=bool(who))
        if resume:
            self.console.print(f"  going on from the last checkpoint in {folder}", soft_wrap=True)

    def remark(self, line: str | None) -> None:
        """A line about the rows: how many were cut or left out, what a template does with them; None prints nothing."""
        if line is not None:
            self.console.print(f"  {line}", soft_wrap=True)

    def __enter__(self) -> Live:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self.progress.stop()

    def round_begins(self, round: int, rounds: int, cohort: Sequence[int]) -> None:
        """See Watch."""
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(f"round {round}/{rounds}", total=len(cohort), note=self.note)

    def client_done(self, client: int) -> None:
        """See Watch."""
        if self.task is not None:
            self.progress.advance(self.task)

    def round_ends(self, record: Record, left: float) -> None:
        """See Watch."""
        metrics, visits = record["metrics"], record["clients"]
        lost = [client for client in visits if "error" in client]
        loss = metrics.get("loss")
        self.sent += record["bytes_down"] + record["bytes_up"]
        parts = [f"loss {loss:.3f}"] if loss is not None else []
        if (spent := metrics.get("epsilon")) is not None:
            parts.append(f"epsilon {spent:.3g}")
        parts += [self.scored] if self.scored else []
        memory = f"memory {size(record['peak_memory_bytes'])}"
        self.note = ", ".join([*parts, size(self.sent), memory, f"{span(left)} left"])
        parts = [_many(len(visits) - len(lost), "client") + (f" ({len(lost)} dropped)" if lost else "")]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if (spent := metrics.get("epsilon")) is not None:
            parts.append(f"epsilon {spent:.3g}")
        if metrics.get("skipped"):
            parts.append(f"{_many(round(metrics['skipped']), 'step')} skipped")
        parts += [
            f"down {size(record['bytes_down'])}",
            f"up {size(record['bytes_up'])}",
            span(record["seconds"]),
            memory,
        ]
        if left > 0:
            parts.append(f"{span(left)} left")
        self.console.print(f"round {record['round']}/{self.rounds}: {', '.join(parts)}", soft_wrap=True)
        for client in lost:
            self.console.print(f"  {client['name']} dropped: {client['error']}")
        for client in (client for client in record["clients"] if "left_out" in client):
            self.console.print(f"  {client['name']} left out: {client['left_out']}")

    def evaluated(self, record: Record) -> None:
        """See Watch."""
        when = f"after round {record['round']}" if record["round"] else "at the start"
        self.console.print(f"  {when}, {record['split']}: {_score(record)}")
        better = next((key for key in ("accuracy", "rouge_l") if record.get(key) is not None), "loss")
        self.scored = f"{record['split']} {better} {_points(record[better])}"


class Lines(Watch):
    """A line of JSON for each thing that happens: see Journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def round_begins(self, round: int, rounds: int, cohort: Sequence[int]) -> None:
        """See Watch."""
        self.journal.about["round"] = round

    def round_ends(self, record: Record, left: float) -> None:
        """See Watch."""
        self.journal.round_ends(record)

    def evaluated(self, record: Record) -> None:
        """See Watch."""
        self.journal.evaluated(record)


def print_summary(folder: Path, note: str | None = None) -> None:
    """The table that a run ends with, a few held-out rows before and after, and a note if there is one."""
    summary = json.loads((folder / "summary.json").read_text())
    if (journal := current()) is not None:
        totals = {name: summary[name] for name in ("rounds", "bytes_down", "bytes_up", "seconds", "sha256")}
        journal.add("ended", f"the run has ended; its folder is {folder}", **totals, why=summary.get("ended"))
        return
    console = Screen()
    rounds = read_records(folder / "rounds.jsonl")
    last = {row["split"]: row for row in summary["final"]}  # sites that were absent have no row
    evals = [(row, last[row["split"]]) for row in summary["first"] if row["split"] in last]
    start = {row["split"]: row for row in summary["first"]}
    if start or last:
        scored = read_records(folder / "evals.jsonl")
        rounds_scored = {row["round"] for row in scored}
        curve = ["on the way"] if len(rounds_scored) > 2 and console.encoding.startswith("utf") else []
        table = Table("score", *(Column(head, justify="right") for head in ("before", "after")), *curve)
        for split in {**start, **last}:
            before, after = start.get(split, {}), last.get(split, {})
            for field, score in MEASURED.items():
                if before.get(field) is not None or after.get(field) is not None:
                    points = [row.get(field) for row in scored if row.get("split") == split]
                    drawn = [bars([math.nan if value is None else value for value in points])] if curve else []
                    ends = _points(before.get(field)), _points(after.get(field))
                    table.add_row(f"{split} {score.title}", *ends, *drawn)
        console.print(table)
    file = folder / "run.toml"
    part = file.exists() and config.load(file).model.view.kind != "full"
    whole = "all that is trained" if part else "whole model"
    table = Table("one client, one round", *(Column(h, justify="right") for h in ("bytes", whole, "ratio")))
    for way in ("down", "up"):
        sent = [c[f"bytes_{way}"] for record in rounds for c in record["clients"] if c[f"bytes_{way}"]]
        mean = sum(sent) / max(1, len(sent))
        table.add_row(way, f"{mean:,.0f}", f"{summary['model_bytes']:,}", share(mean, summary["model_bytes"]))
    console.print(table)
    for first, final in evals:
        if first["samples"] and final["samples"]:
            console.print(f"{first['split']}: what the model answers")
        for before, after in zip(first["samples"], final["samples"], strict=False):
            prompt = " ".join(before["prompt"].split())
            console.print(f"  {prompt if len(prompt) < 75 else '... ' + prompt[-70:]}")
            parts = [f"before: {_short(before['answer'])}", f"after: {_short(after['answer'])}"]
            parts.append(f"expected: {_short(before['expected'])}")
            line = " | ".join(parts)
            for text in [line] if len(line) <= 76 else parts:
                console.print(f"    {text}")
    print_clients(console, rounds, read_records(folder / "evals.jsonl"))
    if (promised := summary.get("privacy")) is not None:
        console.print(in_words(promised), soft_wrap=True)
        console.print(f"  not counted: {'; '.join(promised['not_counted'])}", soft_wrap=True)
    if "ended" in summary:
        console.print(f"ended after round {summary['rounds']}: {summary['ended']}", soft_wrap=True)
    if (kept := summary.get("kept")) is not None:
        console.print(f"the model is that of round {kept['round']}, chosen by the loss on {kept['on']}", soft_wrap=True)
    console.print(
        f"{_many(summary['rounds'], 'round')} in {span(summary['seconds'])}, peak memory "
        f"{size(summary['peak_memory_bytes'])}; in all {size(summary['bytes_down'])} down, "
        f"{size(summary['bytes_up'])} up"
    )
    if note is not None:
        console.print(note, soft_wrap=True)
    model, thin = folder / "model", folder / "model.thin"
    if thin.exists() and not model.exists():
        console.print(f"what was learnt is in {thin}; thinwire merge makes it and its base a model", soft_wrap=True)
    else:
        console.print(f"the model is in {model}", soft_wrap=True)


def print_clients(console: Screen, rounds: Sequence[Record], evals: Sequence[Record]) -> None:
    """A line a client: how much it counted and why, its own scores; where there are scores, or shares by agreement."""
    found = clients_of(rounds, evals)
    plain = {"", "by examples", "equally"}
    if not any(client.first or client.withheld or client.why not in plain for client in found):
        return
    scores = [name for name in MEASURED if any(client.last.get(name) is not None for client in found)]
    heads = ["rows", "counted", *(f"{MEASURED[name].title} {when}" for name in scores for when in ("before", "after"))]
    table = Table("client", *(Column(head, justify="right") for head in heads))
    for client in found[:LISTED]:
        counted = "" if client.share is None else f"{client.share:.1%}"
        cells = [_points(end.get(name)) for name in scores for end in (client.first, client.last)]
        rows = "" if client.rows is None else f"{client.rows:,}"
        table.add_row(client.name, rows, counted, *cells)
    console.print(table)
    for client in found[:LISTED]:
        why = [*([client.why] if client.why not in plain else []), *(["scores withheld"] if client.withheld else [])]
        if why:
            console.print(f"  {client.name}: {'; '.join(why)}", soft_wrap=True)
    if len(found) > LISTED:
        console.print(f"and {_many(len(found) - LISTED, 'client')} more, in evals.jsonl and rounds.jsonl")


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


def print_scores(scores: Sequence[Record]) -> None:
    """One line a split."""
    for record in scores:
        Screen().print(f"{record['split']}: {_score(record)} ({_many(record['rows'], 'row')})", soft_wrap=True)


def _score(record: Record) -> str:
    parts = [] if record["loss"] is not None else ["loss not finite"]
    for field, score in SCORES.items():
        if record.get(field) is not None:
            parts.append(f"{score.title} {record[field]:{score.form}}")
    return ", ".join(parts)


def _points(score: float | None) -> str:
    """A score; nothing where it was not measured, or is no number."""
    return "" if score is None else f"{score:.3f}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
