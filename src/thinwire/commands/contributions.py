"""thinwire contributions: what each client's reply in a run's last round was worth, on the server's own rows."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.commands.terminal import Overrides, echo, one_line, settle

if TYPE_CHECKING:
    from thinwire.assemble.replay import Replay
    from thinwire.report.sites import Matrix

COLUMNS = 8  # clients that a line of the table has


def contributions(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, which has kept its last replies.")],
    overrides: Overrides = None,
    orders: Annotated[int, typer.Option(min=2, help="Random orders of the clients for the Shapley value.")] = 50,
    seed: Annotated[int, typer.Option(help="By which the orders are drawn.")] = 0,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Instead: how what each client has learnt does on each client's rows.")
    ] = False,
) -> None:
    """Leave-one-out and Shapley values of the last round's replies by the loss on data.public; its cost comes first."""
    with one_line():
        settle()
        from thinwire import config, files, records
        from thinwire.assemble.replay import Replay
        from thinwire.commands.screen import Screen
        from thinwire.evaluate.contributions import exact, leave_one_out, most, shapley
        from thinwire.keys import Key
        from thinwire.report.sites import Matrix
        from thinwire.units import span

        if not (path / "run.toml").exists():
            raise config.ConfigError(f"{path}: not a run's folder")
        if matrix and (path / "cross.json").exists():
            _show(records.read_json(Matrix, path / "cross.json"), path / "cross.json")
            return
        with tempfile.TemporaryDirectory(dir=path, prefix=".contributions.") as place:
            if matrix:
                _cross(Replay(path, Path(place), overrides or (), cross=True))
                return
            replay, known = Replay(path, Path(place), overrides or ()), dict[frozenset[int], float]()

            def value(clients: frozenset[int]) -> float:
                if clients not in known:
                    known[clients] = -replay.loss(clients)
                return known[clients]

            clients, asked = replay.clients, most(len(replay.clients), orders)
            way = "exactly" if exact(len(clients), orders) else f"from {orders} random orders"
            echo(
                f"round {replay.round}, {len(clients)} replies, Shapley values {way}: at most {asked:,} times the "
                f"round's mean and {replay.rows:,} public rows forward"
            )
            started = time.perf_counter()
            value(frozenset())
            value(frozenset(clients))
            echo(f"two of them took {span(time.perf_counter() - started)}: about "
                 f"{span((time.perf_counter() - started) / 2 * max(asked - 2, 0))} are left")  # fmt: skip
            alone = leave_one_out(value, clients)
            worth = shapley(value, clients, orders, Key.root(seed).fold("contributions"))
        found = {
            "round": replay.round,
            "rows": replay.rows,
            "orders": 0 if exact(len(clients), orders) else orders,
            "before": -known[frozenset()],
            "after": -known[frozenset(clients)],
            "clients": {
                str(client): {
                    "name": replay.names[client],
                    "leave_one_out": alone[client],
                    "shapley": worth[client].value,
                    "error": worth[client].error,
                }
                for client in clients
            },
        }
        files.write(path / "contributions.json", records.dumps(found, indent=2) + "\n")
        from rich.table import Column, Table

        heads = ("leave-one-out", "Shapley", "standard error")
        table = Table("client", *(Column(head, justify="right") for head in heads))
        for client in clients:
            cells = (alone[client], worth[client].value, worth[client].error)
            table.add_row(replay.names[client], *(f"{cell:+.5f}" for cell in cells[:2]), f"{cells[2]:.5f}")
        screen = Screen()
        screen.print(table)
        screen.print(
            f"how much each has lowered the loss on {replay.rows:,} public rows, from {found['before']:.5f} to "
            f"{found['after']:.5f} nats a token; also in {path / 'contributions.json'}",
            soft_wrap=True,
        )


def _cross(replay: Replay) -> None:
    """The loss on each client's rows of each client's own fine-tuning: its reply of the last round, alone."""
    from thinwire import files, records
    from thinwire.report.sites import Learnt, Matrix
    from thinwire.units import span

    clients, names = replay.clients, [split.name for split in replay.splits]
    count = len(clients) + 1
    echo(
        f"round {replay.round}, {len(clients)} replies on the rows of {len(names)} clients: {count} models, and "
        f"{count} times {replay.rows:,} rows forward"
    )
    started = time.perf_counter()
    together = replay.losses(frozenset(clients))
    echo(f"the first took {span(time.perf_counter() - started)}: about "
         f"{span((time.perf_counter() - started) * len(clients))} are left")  # fmt: skip
    own = {client: replay.losses(frozenset([client]), own=True) for client in clients}
    learnt = {str(client): Learnt(replay.names[client], own[client]) for client in clients}
    rows: dict[str, int | None] = {split.name: len(split.data) for split in replay.splits}
    found = Matrix(replay.round, rows, together, learnt)
    files.write(replay.folder / "cross.json", records.dumps(asdict(found), indent=2) + "\n")
    _show(found, replay.folder / "cross.json")


def _show(found: Matrix, place: Path) -> None:
    """The matrix, some columns at a time."""
    from rich.table import Column, Table

    from thinwire.commands.screen import Screen

    names, screen = [*found.rows], Screen()
    for start in range(0, len(names), COLUMNS):
        shown = slice(start, start + COLUMNS)
        table = Table("learnt by / rows of", *(Column(name, justify="right") for name in names[shown]))
        for line in found.lines:
            table.add_row(line.name, *("-" if loss is None else f"{loss:.4f}" for loss in line.losses[shown]))
        screen.print(table)
    screen.print(
        f"loss, nats a token, on each client's own rows, of what each has made of the model in round "
        f"{found.round}; also in {place}",
        soft_wrap=True,
    )
