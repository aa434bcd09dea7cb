"""thinwire local-federation: a run on Flower or NVIDIA FLARE, server and sites all on this machine's loopback."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from thinwire.commands.claim import claimed, record
from thinwire.commands.terminal import AGAIN, Overrides, Stopped, echo, leaving, one_line, settle


def local_federation(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file.")],
    overrides: Overrides = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Sites; the run file's clients by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    engine: Annotated[Literal["flower", "nvflare"], typer.Option(help="What carries the frames.")] = "flower",
    kill_a_client: Annotated[bool, typer.Option("--kill-a-client", help="Kill a site's node after round 1.")] = False,
) -> None:
    """Run a run file with a server and sites on this machine, as a federation of machines would."""
    with one_line(), ExitStack() as stack:
        settle()
        from thinwire import assemble, config
        from thinwire.commands.show import print_summary
        from thinwire.federation.follower import Ended, check_model, rounds_of
        from thinwire.federation.local import Local, named, require
        from thinwire.federation.progress import Progress

        require(engine)
        os.umask(0o077)  # what lies below the run's folder is for its owner
        changes = list(overrides or [])
        settings = config.load(file, changes)
        if clients is not None and settings.data.partition in ("iid", "dirichlet"):
            settings = config.load(file, [*changes, f"data.clients={clients}"])
        settings, rows = assemble.prepared(settings)
        if clients is not None and len(rows.clients) != clients:
            raise config.ConfigError(f"--clients: the data has {len(rows.clients)} clients, not {clients}")
        check_model(settings, rows.splits)
        folder = out if out is not None else Path("runs") / settings.name
        if stack.enter_context(claimed(folder, settings, resume)):
            return
        record(folder, settings)
        local = Local(folder / "federation", named(settings, rows.clients), echo, engine)
        progress, killed = Progress(folder, settings.rounds, echo), False
        progress.skip()

        leave, leaves = stack.enter_context(leaving()), False

        def watch() -> None:
            nonlocal killed, leaves
            if leave and not leaves:
                leaves = True
                local.server.leave(folder)
            progress.tick()
            if kill_a_client and not killed and rounds_of(folder) >= 1:
                killed = True
                echo(f"{local.names[-1]}: killed its node; it will come back by itself")
                local.kill(local.names[-1])

        on = "" if engine == "flower" else f" --engine {engine}"
        again = f"go on with: thinwire local-federation {file} --out {folder}{on} --resume"
        try:
            who = ", ".join(local.names)
            echo(f"a hub and {len(local.names)} sites are starting ({who}); what they print is in {folder}/federation")
            local.start()
            local.follow(folder, settings, rows.splits, watch)
            progress.tick()
        except KeyboardInterrupt:
            raise Stopped(f"stopped; {again}", AGAIN if leave else 1) from None
        except Ended as error:
            raise Stopped(f"{error}; {again}", AGAIN if error.again else 1) from None
        finally:
            local.stop()
        print_summary(folder)
