"""What the terminal shows: progress while a run goes on, tables after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from thinwire import config
from thinwire.build import Rows
from thinwire.compare import ABOUT, Plan
from thinwire.config import Run, method_name
from thinwire.data.shown import printable
from thinwire.model.net import Net
from thinwire.runtime.course import Record, Watch, read_records

if TYPE_CHECKING:
    from thinwire.standings import Line

LISTED = 50  # clients that a line names


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < (999.5 if unit == "B" else 999.95):  # what rounds to 1000 belongs to the next unit
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(count: float) -> str:
    """A count for people: 26.9 k, 134.5 M."""
    for unit in ("", " k", " M"):
        if count < 999.95:
            return f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.1f} G"


def share(part: float, whole: float) -> str:
    """part/whole where a part is most often far smaller: 1/8,231, 1/3.9, 1/1, 2.0/1."""
    if not part or not whole:
        return "-"
    times = whole / part
    if times < 0.95:
        return f"{1 / times:,.1f}/1"
    return f"1/{times:,.0f}" if times < 1.05 or times >= 9.95 else f"1/{times:.1f}"


def span(seconds: float) -> str:
    """A time for people: 0.4 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Screen(Console):
    """A console that escapes control characters in all that is printed, and takes no brackets or colons for markup.

    What is printed holds rows, names of clients, answers of models and paths. It overrides the two methods through
    which all text passes: before it is measured, so that tables stay straight, and, for the library's own, after.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """See Console."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See Console."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)


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
        what = f"all {number(net.size)} parameters" if run.model.lora is None else f"{number(net.size)} LoRA factors"
        self.console.print(f"  {what} are trained, over {_many(run.rounds, 'round')}")
        who = f": {_listed(list(rows.clients))}" if run.data.partition == "files" else ""
        many = _many(len(rows.clients), "client")
        self.console.print(f"  {_many(held, 'row')} stay where they are, with {many}{who}", soft_wrap=bool(who))
        if resume:
            self.console.print(f"  going on from the last checkpoint in {folder}", soft_wrap=True)

    def remark(self, line: str | None) -> None:
        """A line about the rows: how many were cut or left out, what a template does with them; None says nothing."""
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
        parts += [self.scored] if self.scored else []
        memory = f"memory {size(record['peak_memory_bytes'])}"
        self.note = ", ".join([*parts, size(self.sent), memory, f"{span(left)} left"])
        parts = [_many(len(visits) - len(lost), "client") + (f" ({len(lost)} dropped)" if lost else "")]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
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

    def evaluated(self, record: Record) -> None:
        """See Watch."""
        when = f"after round {record['round']}" if record["round"] else "at the start"
        self.console.print(f"  {when}, {record['split']}: {_score(record)}")
        better = next((key for key in ("accuracy", "rouge_l") if record.get(key) is not None), "loss")
        self.scored = f"{record['split']} {better} {_points(record[better])}"


def print_summary(folder: Path, note: str | None = None) -> None:
    """The table that a run ends with, a few held-out rows before and after, and a note if there is one."""
    console = Screen()
    summary = json.loads((folder / "summary.json").read_text())
    rounds = read_records(folder / "rounds.jsonl")
    last = {row["split"]: row for row in summary["final"]}  # sites that were absent have no row
    evals = [(row, last[row["split"]]) for row in summary["first"] if row["split"] in last]
    start = {row["split"]: row for row in summary["first"]}
    if start or last:
        table = Table("score", Column("before", justify="right"), Column("after", justify="right"))
        for split in {**start, **last}:
            before, after = start.get(split, {}), last.get(split, {})
            for field, name in (
                ("loss", "loss"),
                ("accuracy", "accuracy"),
                ("rouge_l", "Rouge-L"),
                ("bleu", "BLEU"),
                ("exact_match", "exact match"),
            ):
                if before.get(field) is not None or after.get(field) is not None:
                    table.add_row(f"{split} {name}", _points(before.get(field)), _points(after.get(field)))
        console.print(table)
    file = folder / "run.toml"
    whole = "all factors" if file.exists() and config.load(file).model.lora is not None else "whole model"
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
    console.print(
        f"{_many(summary['rounds'], 'round')} in {span(summary['seconds'])}, peak memory "
        f"{size(summary['peak_memory_bytes'])}; in all {size(summary['bytes_down'])} down, "
        f"{size(summary['bytes_up'])} up"
    )
    if note is not None:
        console.print(note, soft_wrap=True)
    console.print(f"the model is in {folder / 'model'}", soft_wrap=True)


def print_methods(table: dict[str, Any]) -> None:
    """The methods with their papers and fields."""
    console = Screen()
    for name, method in table.items():
        console.print(f"{name}: {method['about']}", style="bold", soft_wrap=True)
        console.print(f"  {method['paper']}", soft_wrap=True)
        for field, info in method["fields"].items():
            console.print(f"  {field} = {json.dumps(info['default'])}  ({info['type']})", soft_wrap=True)


def print_comparison(lines: Sequence[Line], made: Sequence[Plan], folder: Path) -> None:
    """The grids, the table, and what its marks mean."""
    console = Screen()
    for plan in made:
        if plan.tuned:
            console.print(f"{plan.name}: validation loss by lr")
            for rate, loss in plan.tuned.items():
                mark = "  taken" + (", at the edge of the grid" if plan.edge else "") if rate == plan.lr else ""
                console.print(f"  {rate:<10g} {loss:.4f}{mark}")
    keys = list(dict.fromkeys(key for line in lines for key in line.scores))
    scores = Table(Column("method", no_wrap=True), *(Column(key, justify="right") for key in (*keys, "lr", "steps")))
    heads = ("bytes a visit", "down", "up", "client", "server", "a visit", "a round")
    costs = Table(Column("method", no_wrap=True), *(Column(head, justify="right") for head in heads))
    for line in lines:
        name = line.name + (" *" if line.trained is False else "")
        lr = "" if line.lr is None else f"{line.lr:g}{' (edge)' if line.edge else ''}"
        steps = "" if line.steps is None else f"{line.steps:,.0f}"
        scores.add_row(name, *(_spread(*line.scores[key]) if key in line.scores else "" for key in keys), lr, steps)
        sizes = (line.bytes_visit, line.bytes_down, line.bytes_up, line.client_memory, line.server_memory)
        times = (line.visit_seconds, line.round_seconds)
        if line.lr is not None:
            cells = [*(_or(size, value) for value in sizes), *(_or(span, value) for value in times)]
            costs.add_row(name, *cells)
    console.print(scores)
    console.print(costs)
    console.print(
        "client, server: peak memory of either, in a process of its own; their seconds there, two clients a round"
    )
    for line in lines:
        if line.target_round is not None:
            sent = "" if line.target_bytes is None else f", {size(line.target_bytes)}"
            console.print(f"{line.name}: target loss after {line.target_round:.1f} rounds{sent}")
        if line.note:
            console.print(f"{line.name}: {line.note}")
        if line.name in ABOUT:
            console.print(f"{line.name}: {ABOUT[line.name]}")
    if any(line.trained is False for line in lines):
        console.print("* untrained: within two standard errors of the base model")
    there = {line.name for line in lines}
    missing = [plan.title for plan in made if plan.title not in there]
    if missing:
        console.print(f"not run yet: {', '.join(missing)}")
    console.print(f"the table is in {folder / 'table.csv'} and {folder / 'table.json'}", soft_wrap=True)


def _or(form: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else form(value)


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def print_scores(scores: Sequence[Record]) -> None:
    """One line a split."""
    for record in scores:
        Screen().print(f"{record['split']}: {_score(record)} ({_many(record['rows'], 'row')})", soft_wrap=True)


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _score(record: Record) -> str:
    parts = [f"loss {record['loss']:.4f}" if record["loss"] is not None else "loss not finite"]
    if record["perplexity"] is not None:
        parts.append(f"perplexity {record['perplexity']:.3f}")
    if record["accuracy"] is not None:
        parts.append(f"accuracy {record['accuracy']:.3f}")
    if record["rouge_l"] is not None:
        parts.append(f"Rouge-L {record['rouge_l']:.3f}")
    if record["bleu"] is not None:
        parts.append(f"BLEU {record['bleu']:.1f}")
    if record.get("exact_match") is not None:
        parts.append(f"exact match {record['exact_match']:.3f}")
    return ", ".join(parts)


def _points(score: float | None) -> str:
    """A score; nothing where it was not measured, or is no number."""
    return "" if score is None else f"{score:.3f}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
