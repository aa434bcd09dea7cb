"""What all commands of the command line share: errors in one line, and the environment that libraries must find."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from thinwire.errors import RunError

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields of the run file to set.")]


class Stopped(Exception):
    """The run did not end; the message says why, and how to go on."""


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit status 2, a known stop into 1."""
    try:
        yield
    except Stopped as stop:
        typer.echo(f"thinwire: {stop}", err=True)
        raise typer.Exit(1) from None
    except RunError as error:
        typer.echo(f"thinwire: {error}".replace("\n", " "), err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        from thinwire.config import ConfigError
        from thinwire.data.errors import DataError
        from thinwire.model.errors import ModelError

        if not isinstance(error, ConfigError | DataError | ModelError):
            raise
        typer.echo(f"thinwire: {error}".replace("\n", " "), err=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        typer.echo(f"thinwire: {cause(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("thinwire: stopped", err=True)
        raise typer.Exit(1) from None


def cause(error: Exception) -> str:
    """Why it failed, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def settle() -> None:
    """What libraries must find in the environment before they are imported.

    No progress bars and advice within our own progress. And OpenMP's threads sleep while they wait: on a machine that
    does other work too, threads that spin hold each other up tenfold.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
