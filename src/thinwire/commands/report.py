"""thinwire report: one page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thinwire.commands.terminal import echo, one_line


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or folders that hold some.")],
    out: Annotated[Path, typer.Option(help="The page's file.")] = Path("report.html"),
) -> None:
    """Make one self-contained page about runs: curves, bars, the table, answers to public prompts."""
    with one_line():
        from thinwire import files
        from thinwire.report.page import render
        from thinwire.report.runs import collect
        from thinwire.units import size

        page = render(collect(runs))
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(out, page)
        echo(f"{out}: {size(len(page.encode()))}, opens in any browser and asks no network")
