"""The clients of a run, one by one: how much each counted and why, and how the model scores on its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinwire.records import Record, visits

OWN = ("sites", "sites_train")  # splits of the clients' own rows


@dataclass(frozen=True)
class Client:
    """One client. `share`: of the rounds in which its reply counted, in the mean; `why`: of the last one.

    `first`, `last`: its lines of the first and the last evaluation at the clients. `worth`: its line of
    contributions.json.
    """

    name: str
    rows: int | None
    counted: int
    dropped: int
    share: float | None
    why: str
    first: Record
    last: Record
    withheld: bool
    worth: Record


@dataclass(frozen=True)
class Learnt:
    """What a client alone has learnt: its losses on each client's rows, None where none was given."""

    name: str
    losses: Sequence[float | None]


@dataclass(frozen=True)
class Matrix:
    """cross.json: `rows`, how many each client has scored; what `clients` have learnt, and all `together`."""

    round: int
    rows: dict[str, int | None]
    together: Sequence[float | None]
    clients: dict[str, Learnt]

    @property
    def lines(self) -> list[Learnt]:
        """A line a client, and one of all together; as many losses in each as there are clients with rows."""
        count = len(self.rows)
        found = [*self.clients.values(), Learnt("together", self.together)]
        return [replace(each, losses=[*each.losses[:count], *[None] * (count - len(each.losses))]) for each in found]


def clients_of(rounds: Sequence[Record], evals: Sequence[Record], contributions: Record | None = None) -> list[Client]:
    """All clients that the records name, in the order of their numbers."""
    names: dict[int, str] = {}
    shares: dict[int, list[float]] = {}
    whys: dict[int, str] = {}
    rows: dict[int, int] = {}
    dropped: dict[int, int] = {}
    for record in rounds:
        for visit in visits(record):
            id = visit["id"]
            names[id] = str(visit.get("name", id))
            if visit.get("error"):
                dropped[id] = dropped.get(id, 0) + 1
            if isinstance(visit.get("share"), float | int):
                shares.setdefault(id, []).append(visit["share"])
                whys[id] = str(visit.get("why", ""))
            if isinstance(visit.get("examples"), int):
                rows[id] = visit["examples"]
    own = [row for row in evals if row.get("split") in OWN]
    lines: dict[int, list[Record]] = {}
    for row in own:
        for line in row.get("each") or []:
            lines.setdefault(line["id"], []).append(line)
            names.setdefault(line["id"], str(line["name"]))
    withheld = {name for row in own for name in row.get("withheld") or []}
    worth = {int(id): line for id, line in (contributions or {}).get("clients", {}).items()}
    return [
        Client(
            names[id],
            lines[id][-1]["rows"] if id in lines else rows.get(id),
            len(shares.get(id, [])),
            dropped.get(id, 0),
            sum(shares[id]) / len(shares[id]) if id in shares else None,
            whys.get(id, ""),
            lines[id][0] if id in lines else {},
            lines[id][-1] if id in lines else {},
            names[id] in withheld,
            worth.get(id, {}),
        )
        for id in sorted(names)
    ]
