"""What the terminal shows: progress while a run goes on, tables after it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from thinwire.config import Run
from thinwire.model.flat import Net
from thinwire.runtime.loop import Record, Watch, read_records


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def span(seconds: float) -> str:
    """A time for people: 42 s, 3 min 05 s, 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Live(Watch):
    """A line that moves on a terminal, and one line a round anywhere."""

    def __init__(self, run: Run, rows: int, net: Net) -> None:
        self.console = Console(highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} clients"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.note, self.began = "", time.perf_counter()
        self.console.print(
            f"{run.name}: {run.method.name} on {run.model.path} ({net.size / 1e6:.1f} M parameters, all of them), "  # type: ignore[attr-defined]
            f"{rows} rows that stay where they are, {run.rounds} rounds"
        )

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
        answered = [c for c in record["clients"] if "error" not in c]
        loss = record["metrics"].get("loss")
        self.note = f"loss {loss:.3f}, {span(left)} left" if loss is not None else f"{span(left)} left"
        lost = len(record["clients"]) - len(answered)
        self.console.print(
            f"round {record['round']}: {len(answered)} clients"
            + (f" ({lost} dropped)" if lost else "")
            + (f", loss {loss:.4f}" if loss is not None else "")
            + (f", {record['metrics']['skipped']:.0f} steps skipped" if record["metrics"].get("skipped") else "")
            + f", down {size(record['bytes_down'])}, up {size(record['bytes_up'])}, {span(record['seconds'])}"
            + (f", {span(left)} left" if left > 0 else "")
        )
        for client in record["clients"]:
            if "error" in client:
                self.console.print(f"  client {client['name']} dropped: {client['error']}")

    def evaluated(self, record: Record) -> None:
        """See Watch."""
        self.console.print(f"  round {record['round']}, {record['split']}: {_score(record)}")


def print_summary(folder: Path) -> None:
    """The table that a run ends with, and a few held-out rows before and after."""
    console = Console(highlight=False)
    summary = json.loads((folder / "summary.json").read_text())
    rounds = read_records(folder / "rounds.jsonl")
    visits = [client for record in rounds for client in record["clients"]]
    table = Table(title=f"{folder}: {summary['rounds']} rounds", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for first, final in zip(summary["first"], summary["final"], strict=True):
        for field in ("loss", "accuracy", "rouge_l"):
            if final[field] is not None:
                name = {"rouge_l": "Rouge-L"}.get(field, field)
                table.add_row(f"{first['split']} {name}", f"{first[field]:.3f}", f"{final[field]:.3f}")
    console.print(table)
    table = Table()
    for heading in ("a client and round", "bytes", "sending the model", "ratio"):
        table.add_column(heading, justify="left" if not table.columns else "right")
    for way in ("down", "up"):
        mean = sum(v[f"bytes_{way}"] for v in visits) / max(1, len(visits))
        ratio = f"1/{summary['model_bytes'] / mean:,.0f}" if mean else "-"
        table.add_row(way, f"{mean:,.0f}", f"{summary['model_bytes']:,}", ratio)
    console.print(table)
    console.print(
        f"all clients and rounds: {size(summary['bytes_down'])} down, {size(summary['bytes_up'])} up; "
        f"peak memory {size(summary['peak_memory_bytes'])}; {span(summary['seconds'])}; "
        f"the model is in {folder / 'model'}"
    )
    for first, final in zip(summary["first"], summary["final"], strict=True):
        console.print(f"\n{first['split']}: the answer before and after")
        for before, after in zip(first["samples"], final["samples"], strict=True):
            prompt = " ".join(before["prompt"].split())
            console.print(Text(f"  {prompt if len(prompt) < 150 else '... ' + prompt[-150:]}"))
            console.print(
                Text(f"    before: {_short(before['answer'])} | after: {_short(after['answer'])}"
                     f" | expected: {_short(before['expected'])}")
            )  # fmt: skip


def print_methods(table: dict[str, Any]) -> None:
    """The methods with their papers and fields."""
    console = Console(highlight=False, soft_wrap=True)
    for name, method in table.items():
        console.print(Text(f"{name}: {method['about']}", style="bold"))
        console.print(Text(f"  {method['paper']}"))
        for field, info in method["fields"].items():
            console.print(Text(f"  {field} = {json.dumps(info['default'])}  ({info['type']})"))


def print_scores(scores: Sequence[Record]) -> None:
    """One line a split."""
    console = Console(highlight=False)
    for record in scores:
        console.print(f"{record['split']}: {_score(record)} ({record['rows']} rows)")


def _score(record: Record) -> str:
    parts = [f"loss {record['loss']:.4f}", f"perplexity {record['perplexity']:.3f}"]
    if record["accuracy"] is not None:
        parts.append(f"accuracy {record['accuracy']:.3f}")
    if record["rouge_l"] is not None:
        parts.append(f"Rouge-L {record['rouge_l']:.3f}")
    return ", ".join(parts)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
