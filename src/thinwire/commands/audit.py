"""thinwire audit: whether a run's log is whole, and its records are those that the log was written for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from thinwire.commands.terminal import echo, one_line
from thinwire.records import Record


def audit(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    certificate: Annotated[
        Path | None, typer.Option("--crt", help="The server's certificate: whether it is its key that has signed.")
    ] = None,
    sites: Annotated[
        list[Path] | None, typer.Option("--site", help="A site's own audit.jsonl: whether it has sent what counted.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="A line's hash that was noted earlier: whether it is there.")] = None,
) -> None:
    """Check the hash-chained log of a run, and its records, checkpoints, weights and summary against it."""
    with one_line():
        from thinwire import config
        from thinwire.errors import Damaged
        from thinwire.runtime import audit as log

        file = path / log.FILE
        if not file.exists():
            raise config.ConfigError(f"{path}: no {log.FILE} is there; a run with a [federation] table writes it")
        found = log.audit(path)
        problems = list(found.problems)
        if head is not None and head not in {entry["hash"] for entry in log.read(file)[0]}:
            problems.append(f"{file}: no line has the hash {head}: the log was cut, or is another one")
        if certificate is not None:
            from thinwire.federation.keys import certified

            own = certified(certificate)
            if found.keys != [own]:
                problems.append(f"{file}: is not signed with the key of {certificate}")
        for site in sites or []:
            problems += _others(site, log.read(file)[0])
        for line in problems[:-1]:
            echo(line, err=True)
        if problems:
            raise Damaged(problems[-1])
        state = "the run has ended" if found.ended else "the run has not ended"
        echo(f"{path}: {found.lines} lines, {found.rounds} rounds, {state}; log, records, states and weights agree")
        if certificate is None and found.keys:
            echo("signed with a key of its own: --crt server.crt compares it with the server's certificate")
        elif not found.keys:
            echo("not signed: the run had no server's key")
        echo(
            f"the last line is {found.head}; noted elsewhere, it shows later (--head) that nothing up to it has changed"
        )


def _others(site: Path, entries: Sequence[Record]) -> list[str]:
    """The replies of a site's client that counted in a run, and have not left that site by its own log."""
    from thinwire.errors import ConfigError
    from thinwire.federation.audit import broken, sent

    if not site.is_file():
        raise ConfigError(f"--site: {site} is not a file")
    if (wrong := broken(site)) is not None:
        return [wrong]
    known = sent(site)
    run = next((entry["run"] for entry in entries if entry["event"] == "begin"), -1)
    clients = {client for number, _, client in known if number == run}
    if not clients:
        return [f"{site}: has no reply to this run"]
    return [
        f"{site}: the reply of {reply['name']} in round {entry['round']} is none that it has sent"
        for entry in entries
        if entry["event"] == "round"
        for reply in entry["counted"]
        if reply["id"] in clients
        and reply["sha256"] not in known.get((run, entry["round"] - reply.get("late", 0), reply["id"]), ())
    ]
