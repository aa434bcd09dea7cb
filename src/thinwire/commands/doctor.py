"""thinwire doctor: what may go wrong on this machine, before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thinwire.commands.terminal import Overrides, echo, one_line, settle


def doctor(
    file: Annotated[Path | None, typer.Argument(metavar="FILE.toml", help="A run file, to be held against it.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
) -> None:
    """Look at versions, threads, memory, disk, processor and clock; with a run file at what the run will take of them.

    A line each, warnings first. The exit status is 0 without a warning, 1 with one, 2 for a run file that is none.
    """
    with one_line():
        settle()
        from thinwire.estimate.doctor import examine
        from thinwire.estimate.machine import Machine

        run = None
        if file is not None:
            from thinwire import config

            run = config.load(file, overrides or [])
        found = examine(Machine(), run, out)
        for finding in found:
            echo(f"{'warning' if finding.warns else 'ok':8}{finding.what}: {finding.text}")
    if any(finding.warns for finding in found):
        raise typer.Exit(1)
