"""What all commands of the command line share: errors in one line, and the environment that libraries must find."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields of the run file to set.")]

DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


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


def printable(text: str) -> str:
    """The text as a terminal may show it: control characters but newline and tab, and marks of direction, escaped."""
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or character in DIRECTIONS


def settle() -> None:
    """What libraries must find in the environment before they are imported.

    No progress bars and advice within our own progress. And OpenMP's threads sleep while they wait: on a machine that
    does other work too, threads that spin hold each other up tenfold.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
