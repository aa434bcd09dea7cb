"""Cross-site evaluation: what each client alone has made of the model in a round, on the rows of each client."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from thinwire import files
from thinwire.aggregate.mean import Mean
from thinwire.aggregate.server_step import Plain
from thinwire.aggregate.stack import Stack
from thinwire.core import Averaged, Method, Server
from thinwire.records import Record, dumps, read_records, visits
from thinwire.runtime import checkpoint
from thinwire.runtime.replies import Replies
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import VersionStore

NAME = "cross.json"


def alone(method: Method) -> Method:
    """The method whose round with one reply is what that client has learnt: a plain mean, and a step of its length."""
    if not isinstance(method, Averaged):
        return method
    combined = {} if isinstance(method.aggregation, Stack) else {"aggregation": Mean()}
    return method.model_copy(update={"server_step": Plain(), **combined})


@dataclass
class Cross:
    """Asks all clients for their scores of each kept reply of the last round, by the frames of an evaluation.

    A client receives what one of the others has learnt, as its server would have it after a round of that one.
    """

    method: Method
    survey: Callable[[Any, Server, dict[int, str]], list[Record]]
    names: Sequence[str]
    replies: Replies
    states: Path

    def write(self, folder: Path, state: Any, seats: Seats, now: Iterable[int], held: dict[int, str]) -> None:
        """The matrix of the last round, whose state it is, into a run's folder, unless it is there."""
        last = read_records(folder / "rounds.jsonl")[-1:]
        if last and not (folder / NAME).exists():
            server = seats.server(last[0]["round"], [visit["id"] for visit in visits(last[0])])
            files.write(folder / NAME, dumps(self(state, server, now, held), indent=2) + "\n")

    def __call__(self, state: Any, server: Server, now: Iterable[int], held: dict[int, str]) -> Record:
        """The matrix of losses, nats a token; None where a client gave no score of its own. `state`: after the round.

        `server`: as in the round; `now`: who scores; `held`: client -> the version that it has.
        """
        round, scoring, asked = server.round, tuple(now), itertools.count(server.round + 1)
        names = {str(client): name for client, name in enumerate(self.names)}
        rows: dict[str, int] = {}
        sums = {"bytes_down": 0, "bytes_up": 0}
        errors: dict[str, str] = {}

        def losses(state: Any, at: Server) -> list[float | None]:
            found: dict[int, float] = {}
            number = next(asked)  # a site scores once in a round, and no round has this number
            for record in self.survey(state, replace(at, cohort=scoring, round=number, rounds=number), held):
                for name in sums:
                    sums[name] += record.get(name, 0)
                errors.update(record.get("errors", {}))
                for each in record["each"]:
                    found[each["id"]], rows[str(each["id"])] = each["loss"], each["rows"]
            return [found.get(client) for client in scoring]

        together, own = losses(state, server), {}
        for client in self.replies.clients(round):
            with TemporaryDirectory(dir=self.states.parent, prefix=".cross.") as place:
                beside = replace(server, versions=Beside(server.versions, VersionStore(Path(place), keep=1)))
                before, method = checkpoint.on_disk(self.states, round - 1, self.method.State), alone(self.method)
                mine, _ = method.aggregate(before, beside, self.replies.of(round, method.Up, (client,)))
                own[str(client)] = {"name": names[str(client)], "losses": losses(mine, beside)}
        return {
            "round": round,
            "rows": {names[str(client)]: rows.get(str(client)) for client in scoring},
            "together": together,
            "clients": own,
            **sums,
            **({"errors": errors} if errors else {}),
        }


class Beside:
    """The versions of a run, to which nothing is added: what is put goes to a store of its own."""

    def __init__(self, known: Any, own: VersionStore) -> None:
        self.known, self.own = known, own

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """See core.Versions."""
        return self.own.put(tensors)

    def get(self, version: str) -> Mapping[str, Tensor] | None:
        """See core.Versions."""
        found = self.known.get(version)
        return self.own.get(version) if found is None else found
