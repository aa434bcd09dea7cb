"""thinwire estimate: what a run will cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.commands.terminal import Overrides, echo_json, one_line, settle

if TYPE_CHECKING:
    from thinwire.config import Run
    from thinwire.costs.frames import Span
    from thinwire.estimate.costs import Estimate
    from thinwire.runtime.course import Job


def estimate(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Estimate a run's costs from its file and its model's config alone: bytes, memory, operations, link time."""
    with one_line():
        settle()
        from thinwire import config
        from thinwire.estimate.costs import estimate as estimated

        found = estimated(config.load(file, overrides or []))
        if as_json:
            echo_json(found.plain())
        else:
            show(found)


def show(found: Estimate) -> None:
    """Three tables, and what was assumed."""
    from rich.table import Column, Table

    from thinwire.commands.screen import Screen
    from thinwire.estimate.costs import LINKS
    from thinwire.runtime.round import SMALL
    from thinwire.units import number, size

    def spanned(one: Span) -> str:
        low, high = size(one.least), size(one.most)
        return f"{one.least:,.0f} B" if one.exact else low if low == high else f"{low} to {high}"

    console = Screen()
    console.print(f"{found.method} on {found.model}: {number(found.trained)} of {number(found.parameters)} are trained")
    console.print(f"  {found.clients:,} clients, {found.rounds:,} rounds")
    if found.traffic is not None:
        table = Table("bytes", Column("down", justify="right"), Column("up", justify="right"))
        for name in ("newcomer", "returning", "total"):
            about = {"newcomer": "a newcomer's visit", "returning": "a returning client's", "total": "all visits"}[name]
            table.add_row(about, *(spanned(one) for one in getattr(found.traffic, name)))
        console.print(table)
        table = Table("a visit on a link", *(Column(f"{link} Mbit/s", justify="right") for link in LINKS))
        cells = [tuple(map(_time, found.link_seconds(link) or ())) for link in LINKS]
        table.add_row("down and up", *(" to ".join(dict.fromkeys(cell)) for cell in cells))
        console.print(table)
    if found.client is not None and found.server is not None:
        table = Table("peak memory", Column("client", justify="right"), Column("server", justify="right"))
        for part in ("weights", "gradients", "optimiser", "activations", "runtime", "total"):
            table.add_row(part, size(getattr(found.client, part)), size(getattr(found.server, part)))
        console.print(table)
    if found.kept and found.traffic is not None:
        place = "in files" if found.traffic.returning[1].most > SMALL else "in memory"
        console.print(f"the server reads a round's replies side by side: up to {size(found.kept)} of them stay {place}")
    if found.flops == found.flops:
        console.print(f"a visit takes {found.flops / 1e12:,.3g} TFLOP")
    if found.traffic is None or found.client is None:
        what = "memory" if found.traffic is not None else "bytes" if found.client is not None else "bytes and memory"
        console.print(f"nothing is known of this method's {what} before it runs")
    for text in found.assumed:
        console.print(f"assumed: {text}", soft_wrap=True)


def verdict(run: Run, job: Job, folder: Path) -> str | None:
    """The line on whether a run's bytes were within the estimate; None for a method without one."""
    from thinwire.estimate import traffic

    at = traffic.expected(run, [len(rows) for rows in job.clients], dict(job.net.parameters()), job.net.model.config)
    expected = traffic.traffic(run, at)
    summary = json.loads((folder / "summary.json").read_text())
    return None if expected is None else traffic.verdict(expected, summary["bytes_down"], summary["bytes_up"])


def _time(seconds: float) -> str:
    from thinwire.units import span

    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else span(seconds)
