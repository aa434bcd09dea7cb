"""thinwire client: a site of a federation, until it is stopped."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from thinwire.commands.journal import LogForm, current, journal
from thinwire.commands.terminal import Metrics, Stopped, echo, leaving, one_line, settle, show_command

RETRY = 2.0  # seconds between two attempts to reach a server
TICK = 0.5  # seconds between two looks at the processes


def client(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the federation's server is reached.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="This site's rows, a .jsonl file.")],
    key: Annotated[Path, typer.Option(help="This site's private key, of `thinwire keys site`.")],
    ca: Annotated[Path, typer.Option(help="The server's ca.crt.")],
    name: Annotated[str | None, typer.Option(help="This site's name; the key's file name by default.")] = None,
    heldout: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to score on; by default the share that the run holds out.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The start model's folder here, if not the run file's.")] = None,
    allow_model: Annotated[
        bool, typer.Option("--allow-model", help="Without --model, load what the server's run file names.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="In place of the run file's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="In place of the run file's.")] = None,
    processes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Share the work of each step among so many, a GPU each.")
    ] = 1,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="What may leave this site, a TOML file.")] = None,
    peers: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The other sites' public keys, NAME.pub: secure sums with these alone."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="For the log, the client's memory, and temporary files.")] = Path("site"),
    confine: Annotated[
        bool,
        typer.Option("--confine", help="With bubblewrap: what the server ships sees no rows, and reaches it alone."),
    ] = False,
    metrics: Metrics = None,
    log: LogForm = "text",
) -> None:
    """Take part in federations with this machine's rows: started once, it serves run after run until it is stopped."""
    with journal(log), one_line(), ExitStack() as stack:
        settle()
        from thinwire.errors import ConfigError
        from thinwire.federation.processes import require_flower
        from thinwire.federation.reach import Away, greet, place_of
        from thinwire.federation.sandbox import Sandbox
        from thinwire.operations.metrics import check_port, exporting

        require_flower()
        os.umask(0o077)  # what lies in the site's folder is for its owner
        place_of(server, "--server")
        if metrics is not None:
            check_port(metrics)
        for option, path in (("--key", key), ("--ca", ca)):
            if not path.is_file():
                raise ConfigError(f"{option}: {path} is not a file")
        if confine and (model is None or not Path(model).exists()):
            raise ConfigError("--confine: --model is to name the start model's folder here; no other is seen inside")
        if key.stat().st_mode & 0o077:
            raise ConfigError(f"--key: {key} can be read by others than its owner; chmod 600 {key}")
        if processes > 1:
            import torch

            if (device or "cpu").startswith("cuda") and torch.cuda.device_count() < processes:
                found = torch.cuda.device_count()
                raise ConfigError(f"--processes: {processes} of them, a GPU each, and torch finds {found} here")
        walls = Sandbox.of(filter(None, (data, heldout, policy, folder))) if confine else None
        try:
            greet(server, ca)
            waits = ""
        except Away as away:
            echo(f"{away}; waiting for it")
            waits = str(away)
        # what follows takes its time to import
        from thinwire.data.rows import read_jsonl
        from thinwire.data.source import reader_of
        from thinwire.federation.audit import broken
        from thinwire.federation.policy import Policy
        from thinwire.federation.progress import Notices
        from thinwire.federation.site import Site
        from thinwire.federation.site_processes import SiteSide
        from thinwire.federation.vouching import Vouching
        from thinwire.runtime.folder import locked

        for option, rows in (("--data", data), ("--heldout", heldout)):
            if rows is not None and reader_of(rows) not in (None, read_jsonl):
                raise ConfigError(
                    f"{option}: {rows} is a {rows.suffix} file by its name; a site's rows are a .jsonl file"
                )
            if rows is not None:
                read_jsonl(rows)
        rules = Policy.load(policy)
        if model is None and not (allow_model or rules.model):
            raise ConfigError("--model: missing; or --allow-model takes the one that the server's run file names")
        site = Site(
            name=name or key.stem,
            data=str(data.resolve()),
            folder=str(folder.resolve()),
            socket="",
            heldout=str(heldout.resolve()) if heldout is not None else None,
            model=str(Path(model).resolve()) if model is not None and Path(model).exists() else model,
            device=device,
            threads=threads,
            policy=str(policy.resolve()) if policy is not None else None,
            allow_model=allow_model,
            key=None if peers is None else str(key.resolve()),
            peers=None if peers is None else str(peers.resolve()),
            processes=processes,
        )
        Vouching.of(site)
        stack.enter_context(locked(folder))
        if (wrong := broken(folder / "audit.jsonl")) is not None:
            echo(f"thinwire: {wrong}", err=True)
        stack.enter_context(exporting(folder, metrics))
        leave = stack.enter_context(leaving())
        lines, frames = current(), Notices(folder / "audit.jsonl")
        if lines is not None:
            lines.about["site"] = site.name
        side = SiteSide(site, server, key, ca, confine=walls, show=show_command)
        try:
            while waits and not leave:
                time.sleep(RETRY)
                try:
                    greet(server, ca)
                    break
                except Away as away:
                    if str(away) != waits:
                        echo(f"{away}; waiting for it")
                    waits = str(away)
            if not leave:
                side.start()
                echo(f"{site.name}: what it sends is logged in {folder / 'audit.jsonl'}; Ctrl-C ends it")
            while not (leave and side.idle()):
                time.sleep(TICK)
                if lines is not None:
                    lines.frames(frames.new())
                if (line := side.tick()) is not None:
                    echo(line)
            echo(f"{site.name}: ended, as it was asked to; it takes part again with the same command")
        except KeyboardInterrupt:
            raise Stopped(f"{site.name}: stopped; it takes part again with the same command") from None
        finally:
            side.stop()
