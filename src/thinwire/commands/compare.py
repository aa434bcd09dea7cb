"""thinwire compare: methods and references side by side."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.commands.terminal import Overrides, Stopped, echo, one_line, settle

if TYPE_CHECKING:
    from thinwire.compare import Line, Plan


def compare(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A run file, with a table [compare] or without.")],
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Names, with commas between them.")] = "base,fedavg,fedkseed",
    out: Annotated[Path | None, typer.Option(help="The output's folder; runs/compare-NAME by default.")] = None,
    control: Annotated[bool, typer.Option("--control", help="Run each on shuffled answers too.")] = False,
    part: Annotated[str, typer.Option(metavar="I/N", help="Of N machines that share the work, this one's.")] = "1/1",
) -> None:
    """Run methods and references on the same model, data and cohorts, each with its rate tuned, and print the table."""
    with one_line():
        settle()
        from thinwire import compare as comparison

        tree, settings = comparison.load(file, overrides or [])
        made = comparison.plans(tree, settings, [name.strip() for name in methods.split(",") if name.strip()], control)
        mine = comparison.share(made, part)
        folder = out if out is not None else Path("runs") / f"compare-{tree.get('name', 'run')}"
        comparison.check_output(made, folder)
        comparison.check_models(made)
        folder.mkdir(parents=True, exist_ok=True)
        again = shlex.join(["thinwire", "compare", *sys.argv[2:]])
        try:
            for plan in mine if settings.costs else ():
                comparison.price(plan, folder, echo)
            comparison.settle(made, settings)
            comparison.check_output(made, folder)
            for plan in mine:
                comparison.execute(plan, made, folder, echo)
        except KeyboardInterrupt:
            raise Stopped(f"stopped; the same command goes on: {again}") from None
        except RuntimeError as error:
            raise Stopped(str(error)) from None
        comparison.recall(made, settings, folder)
        lines = [line for plan in made if (line := comparison.line(plan, made, folder, settings.target)) is not None]
        comparison.write(lines, made, folder)
        show(lines, made, folder)


def show(lines: Sequence[Line], made: Sequence[Plan], folder: Path) -> None:
    """The grids, the table, and what its marks mean."""
    from rich.table import Column, Table

    from thinwire.commands.screen import Screen
    from thinwire.compare import ABOUT
    from thinwire.units import size, span

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
