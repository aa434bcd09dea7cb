"""thinwire show: what a run has come to, as it was printed at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thinwire.commands.terminal import one_line


def show(path: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended.")]) -> None:
    """Print a run's scores, bytes and clients: who counted how much and why, and how each is served."""
    with one_line():
        from thinwire import config
        from thinwire.commands.show import print_summary

        if not (path / "summary.json").exists():
            raise config.ConfigError(f"{path}: no run that has ended is there")
        print_summary(path)
