"""The command line. Nothing heavy is imported before a command is chosen, so that --help answers at once."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import Annotated

import typer

from thinwire import __version__
from thinwire.commands.audit import audit
from thinwire.commands.audit_privacy import audit_privacy
from thinwire.commands.chat import chat
from thinwire.commands.client import client
from thinwire.commands.codec import fit_codec
from thinwire.commands.compare import compare
from thinwire.commands.contributions import contributions
from thinwire.commands.data import data
from thinwire.commands.doctor import doctor
from thinwire.commands.estimate import estimate
from thinwire.commands.evaluate import evaluate
from thinwire.commands.export import export, merge
from thinwire.commands.init import init
from thinwire.commands.keys import app as keys
from thinwire.commands.local_federation import local_federation
from thinwire.commands.methods import methods
from thinwire.commands.report import report
from thinwire.commands.run import run
from thinwire.commands.schema import schema
from thinwire.commands.server import server
from thinwire.commands.status import status as status_command
from thinwire.commands.summary import show
from thinwire.commands.terminal import echo
from thinwire.commands.watch import watch

app = typer.Typer(
    name="thinwire",
    help="Fine-tune every parameter of a language model across clients whose data cannot move, over kilobytes.",
    rich_markup_mode=None,  # plain help: rich would be half of its time
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        echo(context.get_help())


for command in (
    run,
    methods,
    compare,
    data,
    init,
    schema,
    chat,
    export,
    merge,
    estimate,
    doctor,
    report,
    watch,
    show,
    contributions,
    audit,
    audit_privacy,
    server,
    client,
    local_federation,
):
    app.command()(command)
app.command(name="eval")(evaluate)
app.command(name="fit-codec")(fit_codec)
app.command(name="status")(status_command)
app.add_typer(keys, name="keys")


def main() -> None:
    """The entry point."""
    atexit.register(gc.freeze)  # at its end the collector would walk through all that torch has made: two seconds
    try:
        status = app(prog_name="thinwire", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        echo(f"thinwire: {error.format_message()} (see thinwire --help)", err=True)  # a wrong option
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
