"""thinwire status: where a run or a site stands, from its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.commands.terminal import AGAIN, echo, echo_json, one_line

if TYPE_CHECKING:
    from thinwire.operations.site_status import SiteStatus
    from thinwire.operations.status import RunStatus

MOST = 12  # kinds of reasons, and latest drops, that are listed


def status(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="The folder of a run or of a site, or one that holds some.")
    ] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object for each folder.")] = False,
) -> None:
    """Show where runs and sites stand: rounds, who was last seen when, bytes, what was dropped and why.

    Exit status 0: each has ended or is running; 75: one is neither, and can go on.
    """
    with one_line():
        from dataclasses import asdict

        from thinwire.operations.folders import found, is_run
        from thinwire.operations.site_status import SiteStatus, site_status
        from thinwire.operations.status import run_status

        all_of = [run_status(folder) if is_run(folder) else site_status(folder) for folder in found(path)]
        if as_json:
            echo_json([asdict(each) for each in all_of] if len(all_of) > 1 else asdict(all_of[0]))
        for each in [] if as_json else all_of:
            for line in _site(each) if isinstance(each, SiteStatus) else _run(each):
                echo(line)
        if not all(each.well for each in all_of):
            raise typer.Exit(AGAIN)


def _run(run: RunStatus) -> list[str]:
    from thinwire.operations.status import ago, counts
    from thinwire.units import size, span

    who = f" (pid {run.pid})" if run.pid is not None else ""
    why = f": {run.why}" if run.why else "; it can go on with --resume" if run.state == "stopped" else ""
    to_go = f", {max(0, run.rounds - run.round)} to go" if run.state != "ended" else ""
    left = f", about {span(run.left)}" if run.left else ""
    lines = [
        f"{run.name}: {run.method}, {run.state}{who}{why}",
        f"  {run.round} of {run.rounds} rounds{to_go}{left}; the last ended {ago(run.changed)}",
        f"  {size(run.bytes_down)} down, {size(run.bytes_up)} up in {span(run.seconds)} of rounds",
    ]
    if run.loss is not None:
        lines.append(f"  training loss {run.loss:.4f}")
    for split, score in run.scores.items():
        values = ", ".join(f"{name} {value:.4f}" for name, value in score.items() if name != "round")
        lines.append(f"  {split} after round {score['round']:.0f}: {values}")
    rows = [("client", "last reply", "seen", "replies", "dropped", "down", "up")]
    for one in run.clients:
        seen = "now" if one.connected and run.state == "running" else ago(one.seen)
        reply = "-" if one.round is None else f"round {one.round}"
        name = one.name if one.member else f"{one.name} (left)"
        rows.append((name, reply, seen, f"{one.replies}", f"{one.dropped}", size(one.bytes_down), size(one.bytes_up)))
    lines += _columns(rows)
    if run.drops:
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts(run.drops).items())
        lines.append(f"  replies that did not count: {kinds}; the last of them:")
        lines += [f"    round {drop.round}, {drop.client}: {drop.reason}" for drop in run.drops[-MOST:]]
    return lines


def _site(site: SiteStatus) -> list[str]:
    from thinwire.operations.status import ago
    from thinwire.units import size

    who = f" (pid {site.pid})" if site.pid is not None else ""
    work = ", a visit is under way" if site.asked else ""
    lines = [f"{site.name}: a site, {site.state}{who}{work}; the last frame came or went {ago(site.seen)}"]
    rows = [("run", "method", "rounds", "last", "scored", "in", "out", "seen")]
    for run in site.runs:
        last = "-" if run.round is None else f"round {run.round}"
        in_out = (size(run.bytes_in), size(run.bytes_out))
        rows.append((run.run, run.method, f"{run.rounds}", last, f"{run.evaluations}", *in_out, ago(run.seen)))
    lines += _columns(rows)
    for run in site.runs:
        lines += [f"  {run.run}, {count} times: {verdict}" for verdict, count in list(run.refused.items())[:MOST]]
    return lines + [f"  {line}" for line in site.notices]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, each cell as wide as its column; nothing for a heading alone."""
    if len(rows) == 1:
        return []
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, wide[1:], strict=True)]
        lines.append("  " + "  ".join([first.ljust(wide[0]), *cells]))
    return lines
