"""What all commands of the command line share: how text is printed, errors in one line, what libraries must find."""

from __future__ import annotations

import logging
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from thinwire.commands.journal import current
from thinwire.data.shown import printable, printable_json
from thinwire.errors import RunError, UserError
from thinwire.records import finite

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields of the run file to set.")]


AGAIN = 75  # the exit status of what may well go on when it is started again: sysexits' EX_TEMPFAIL

Metrics = Annotated[
    int | None,
    typer.Option(min=1, max=65535, metavar="PORT", help="Serve what Prometheus reads at 127.0.0.1:PORT/metrics."),
]


class Stopped(Exception):
    """The run did not end; the message has the reason, and how to go on. `status`: the command's; see AGAIN."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def echo(text: str = "", err: bool = False) -> None:
    """Print a line; control characters in it, which may be others', are escaped."""
    if (journal := current()) is not None:
        journal.add("note", text, "warning" if err else "info")
    else:
        typer.echo(printable(text), err=err)


def echo_json(value: Any, ascii: bool = True) -> None:
    """Print the value as JSON, which stays JSON: control characters are its own escapes."""
    typer.echo(printable_json(finite(value), ascii))


class Notes(logging.Handler):
    """Prints warnings on stderr, each once; what comes with a traceback is for a run's log."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        if record.exc_info is None and (text := record.getMessage()) not in self._seen:
            self._seen.add(text)
            _complain(text, "warning")


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit status 2, a known stop into 1 or AGAIN.

    Warnings of the package are lines on stderr too.
    """
    log, notes = logging.getLogger("thinwire"), Notes()
    log.addHandler(notes)
    before, log.propagate = log.propagate, False
    try:
        with _ends():
            yield
    finally:
        log.removeHandler(notes)
        log.propagate = before


@contextmanager
def _ends() -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        _complain(str(stop))
        raise typer.Exit(stop.status) from None
    except RunError as error:
        _complain(str(error))
        raise typer.Exit(1) from None
    except UserError as error:
        _complain(str(error))
        raise typer.Exit(2) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        _complain(cause(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _complain("stopped")
        raise typer.Exit(1) from None


def _complain(text: str, level: str = "error") -> None:
    if (journal := current()) is not None:
        journal.add("note" if level == "warning" else "stopped", text.replace("\n", " "), level)
        return
    echo(f"thinwire: {text}".replace("\n", " "), err=True)


def cause(error: Exception) -> str:
    """Why it failed, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def show_command(command: Sequence[str]) -> None:
    """Print a command that is run."""
    echo(f"$ {shlex.join(command)}")


class Leave:
    """Whether this process was asked to end by SIGTERM, which what it is at may come to an end before; see leaving."""

    asked = False

    def __bool__(self) -> bool:
        return self.asked

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler: the second signal does as Ctrl-C does."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def leaving() -> Iterator[Leave]:
    """Take SIGTERM for the wish to end at a whole round, and a second one for the wish to end now."""
    leave = Leave()
    before = signal.signal(signal.SIGTERM, leave.take)
    try:
        yield leave
    finally:
        signal.signal(signal.SIGTERM, before)


def settle() -> None:
    """What libraries must find in the environment before they are imported.

    No progress bars and advice within our own progress. And OpenMP's threads sleep while they wait: on a machine that
    does other work too, threads that spin hold each other up tenfold.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
