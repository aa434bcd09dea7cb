"""thinwire server: the hub of a federation on loopback, a proxy before it, and the run."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from thinwire.commands.claim import GoOn, claimed, record
from thinwire.commands.journal import LogForm, current, journal
from thinwire.commands.terminal import AGAIN, Metrics, Overrides, Stopped, echo, leaving, one_line, settle, show_command

PORT = 60.0  # seconds that a port has to come free where a process that was killed held it

RISK = (
    "with --expose-control-api every machine that reaches this port, and holds the CA file that all sites hold, can "
    "run code of its own at the server and at all sites"
)


def server(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file; federation.sites names its sites.")],
    overrides: Overrides = None,
    keys: Annotated[Path, typer.Option(help="The folder that `thinwire keys` has filled.")] = Path("keys"),
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where sites reach the proxy.")] = "0.0.0.0:8443",
    hub_port: Annotated[int | None, typer.Option(help="The hub's port on loopback; any free one by default.")] = None,
    own_proxy: Annotated[
        bool, typer.Option("--own-proxy", help="Start no proxy: yours is to stand there; its configuration is written.")
    ] = False,
    expose: Annotated[
        bool, typer.Option("--expose-control-api", help="No proxy, and the hub itself there. " + RISK.capitalize())
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    go_on: GoOn = False,
    metrics: Metrics = None,
    log: LogForm = "text",
) -> None:
    """Run a run file with sites on other machines: the hub on loopback, and a proxy that lets sites through to it."""
    with journal(log), one_line(), ExitStack() as stack:
        settle()
        from thinwire.errors import ConfigError
        from thinwire.federation.processes import require_flower
        from thinwire.federation.reach import listening, place_of
        from thinwire.operations.metrics import check_port, exporting

        require_flower()
        os.umask(0o077)  # what lies below the run's folder is for its owner
        host, port = place_of(listen, "--listen")
        if own_proxy and expose:
            raise ConfigError("--own-proxy, --expose-control-api: one of them")
        if not own_proxy:
            listening(host, port, "--listen", PORT if go_on else 0.0)
        if metrics is not None:
            check_port(metrics)
        # what follows takes its time to import
        from thinwire import config
        from thinwire.assemble import check_clients, identity
        from thinwire.assemble.agreement import check_agreement
        from thinwire.assemble.choice import check_choice
        from thinwire.assemble.privacy import check_privacy
        from thinwire.commands.show import print_summary
        from thinwire.federation import proxy
        from thinwire.federation.follower import Ended, check_model, federation_of
        from thinwire.federation.progress import Progress
        from thinwire.federation.superlink import ServerSide

        settings = config.load(file, overrides or [])
        sites = federation_of(settings)
        check_clients(settings, len(sites))
        check_model(settings, _splits(settings))
        check_agreement(settings, sites)
        check_privacy(settings, sites)
        check_choice(settings, list(_splits(settings)))
        folder = out if out is not None else Path("runs") / settings.name
        resume = resume or (go_on and (folder / "run.toml").exists())
        if stack.enter_context(claimed(folder, settings, resume)):
            return
        splits = {name: str(Path(path).resolve()) for name, path in _splits(settings).items()}
        home = folder.resolve() / "federation"
        join = settings.federation is not None and settings.federation.join
        if expose:
            side = ServerSide(home, keys, sites, join=join, host=host, port=port, show=show_command)
            start = None
            echo(f"thinwire: {RISK}", err=True)
        else:
            side = ServerSide(home, keys, sites, join=join, port=hub_port, show=show_command)
            start = None if own_proxy else proxy.command(home / "proxy")
            if start is None and not own_proxy:
                raise config.ConfigError(
                    "--listen: neither nginx nor caddy is installed here, and without a proxy Flower's control paths "
                    "would be open to all; install one, or run your own by the files that --own-proxy writes"
                )
            proxy.check(home, keys)
            if hub_port is not None:
                listening("127.0.0.1", hub_port, "--hub-port", PORT if go_on else 0.0)
        record(folder, settings)
        if not expose:
            files = proxy.write(home / "proxy", keys, host, port, side.port)
            if own_proxy:
                echo(f"your proxy is to do what is in {files['nginx']} or {files['caddy']}; the hub is {side.port}")
        front = proxy.Front(side.children, start) if start is not None else None
        lines = current()
        if lines is not None:
            lines.about |= {"run": f"{identity(settings):08x}", "name": settings.name}
        progress = Progress(folder, settings.rounds, echo, None if lines is None else lines.record)
        progress.skip()
        stack.enter_context(exporting(folder, metrics))
        leave, leaves = stack.enter_context(leaving()), False
        again = f"go on with: {shlex.join(['thinwire', 'server', str(file), '--out', str(folder), '--resume'])}"

        def tick() -> None:
            nonlocal leaves
            if leave and not leaves:
                leaves = True
                side.leave(folder)
                echo("asked to end: the run ends after this round, with a checkpoint; asked once more it ends now")
            if front is not None and (line := front.tick()) is not None:
                echo(line)
            progress.tick()

        try:
            side.start()
            if front is not None:
                show_command(front.command)
                front.start()
            echo(f"sites join with: thinwire client --server HOST:{port} --data FILE --key KEY --ca ca.crt")
            side.prepare(folder, settings, splits)
            side.follow(folder, tick)
            progress.tick()
        except KeyboardInterrupt:
            raise Stopped(f"stopped; {again}", AGAIN if leave else 1) from None
        except Ended as error:
            raise Stopped(f"{error}; {again}", AGAIN if error.again else 1) from None
        finally:
            side.stop()
        print_summary(folder)


def _splits(settings: Any) -> dict[str, str]:
    """The rows that the server scores itself: of files that the run names. What sites hold stays there."""
    named = {name: getattr(settings.data, name) for name in ("heldout", "heldout_tasks", "selection")}
    return {name: path for name, path in named.items() if isinstance(path, str)}
