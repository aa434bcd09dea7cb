"""thinwire keys: a site's own pair, the server's certificate, and whose key is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thinwire.commands.terminal import echo, one_line

app = typer.Typer(help="Make a site's key, the server's certificate, and register sites.", rich_markup_mode=None)

Folder = Annotated[Path, typer.Option("--out", help="The folder of the keys.")]


@app.command()
def site(
    name: Annotated[str, typer.Argument(help="The site's name, as the run file has it.")],
    out: Folder = Path("keys"),
) -> None:
    """At a site: make its key. The private half stays here; the public half is printed, for the server."""
    with one_line():
        from thinwire.federation import keys
        from thinwire.federation.processes import require_flower

        require_flower()
        public = keys.make_site(name, out)
        echo(f"the private half is in {out / name}.key, and stays at this site", err=True)
        echo(f"send this line to whoever runs the server, who registers it under the name {name}:", err=True)
        echo(public.read_text().strip())


@app.command()
def server(
    host: Annotated[list[str], typer.Option(help="A name or address by which sites reach the server; repeatable.")],
    out: Folder = Path("keys"),
) -> None:
    """At the server: make the certificate authority, once, and a certificate for its names."""
    with one_line():
        from thinwire.federation import keys
        from thinwire.federation.processes import require_flower

        require_flower()
        ca = keys.make_server(host, out)
        echo(f"{out / 'ca.key'} and {out / 'server.key'} stay here; every site needs {ca}")


@app.command()
def register(
    name: Annotated[str, typer.Argument(help="The site's name, as the run file has it.")],
    public: Annotated[str, typer.Argument(metavar="PUBLIC", help="The site's public half: a file, or the line.")],
    out: Folder = Path("keys"),
    rows: Annotated[int | None, typer.Option(min=1, help="The rows that it has: it may not report more.")] = None,
) -> None:
    """At the server: bind a name to its public key. Runs with federation.join ask it from the next round on."""
    with one_line():
        from thinwire.federation import keys
        from thinwire.federation.processes import require_flower

        require_flower()
        if keys.registered(name, out) and rows is None:
            keys.register(name, public, out)
            echo(f"{name} is registered already, with this key")
            return
        echo(f"{name} is whoever holds the other half of {keys.register(name, public, out, rows)}")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The site's name, as the run file has it.")],
    out: Folder = Path("keys"),
) -> None:
    """At the server: have a site belong to no run any more, from the next round on. Its number is never another's."""
    with one_line():
        from thinwire.federation import keys

        keys.remove(name, out)
        echo(f"{name} takes part in no round from the next one on; thinwire keys register takes it in again")
