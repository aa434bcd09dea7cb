"""thinwire audit-privacy: what a curious server rebuilds of a client, and how much of its rows a run gives away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.commands.terminal import Overrides, Stopped, echo, one_line, settle

if TYPE_CHECKING:
    from thinwire.leaks import Audit, Row


def audit_privacy(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file.")],
    overrides: Overrides = None,
    candidates: Annotated[int, typer.Option(min=2, help="Rows among which the server looks for a client's.")] = 16,
    tries: Annotated[int, typer.Option(min=1, help="Small batches of them that are looked for.")] = 8,
    rows: Annotated[int, typer.Option(min=1, max=4, help="Rows of such a batch.")] = 1,
    canaries: Annotated[int, typer.Option(min=0, help="Rows that nobody has, put in by a coin each; 0: none.")] = 64,
    guesses: Annotated[int, typer.Option(min=0, help="Canaries that are guessed about; half of them by default.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """What one reply gives away, and what canaries show of the whole run; status 1 if that is more than it promises."""
    with one_line():
        settle()
        from thinwire import config, files, records
        from thinwire.leaks import Audit, Size, record

        if json is not None and not json.absolute().parent.is_dir():
            raise config.ConfigError(f"--json: there is no folder {json.parent}")
        audit = Audit(config.load(file, overrides or []), Size(candidates, tries, rows, canaries, guesses))
        echo(f"{audit.name}: {audit.cost}")
        made = audit()
        if json is not None:
            files.write(json, records.dumps(record(audit, made), indent=2) + "\n")
        show(audit, made)
        for row in made:
            if row.leak is not None and row.leak.beyond:
                raise Stopped(
                    f"canaries show an epsilon of at least {row.leak.epsilon:.3g} (95 %), and the run promises "
                    f"{row.leak.claimed or 0:.4g}: its privacy is broken"
                )


def show(audit: Audit, made: list[Row]) -> None:
    """The table, and what it cannot show."""
    from rich.table import Column, Table

    from thinwire.commands.screen import Screen

    table = Table("", *(Column(row.view.name, justify="right") for row in made))
    updates = [row.found.update for row in made]
    table.add_row("update: error over its length", *(f"{update.error:.2g}" for update in updates))
    table.add_row("update: cosine", *(f"{update.cosine:.4f}" for update in updates))
    read = [row.found.tokens for row in made]
    if any(read):
        cells = (f"{t.precision:.2f} / {t.recall:.2f}" if t is not None else "" for t in read)
        table.add_row("tokens read: precision / recall", *cells)
    ranked = [row.found.guess for row in made]
    if guess := next((g for g in ranked if g is not None), None):
        name = f"right row first (chance {guess.chance:.1%})"
        table.add_row(name, *(f"{g.first} of {g.tries}" if g is not None else "" for g in ranked))
    leaks = [row.leak for row in made]
    if one := next((leak for leak in leaks if leak is not None), None):
        for name in one.scores:
            cells = (f"{s.right} of {s.guesses}" if leak and (s := leak.scores[name]) else "" for leak in leaks)
            table.add_row(f"canaries guessed by {name}", *cells)
        table.add_row("epsilon is at least (95 %)", *(f"{leak.epsilon:.3f}" if leak else "" for leak in leaks))
        promised = (f"{leak.claimed:.3f}" if leak and leak.claimed is not None else "" for leak in leaks)
        table.add_row("epsilon promised", *promised)
    screen = Screen()
    screen.print(table)
    if one:
        screen.print(
            f"were all {audit.guesses} guesses right, epsilon would be at least {one.most:.3f} at delta {one.delta:g}; "
            "so few canaries cannot show more",
            soft_wrap=True,
        )
