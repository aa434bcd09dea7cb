"""Evaluation at the clients: how a state scores on their own rows, all together and each by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire import wire
from thinwire.core import Method, Server
from thinwire.records import SCORES
from thinwire.runtime.payloads import Scores
from thinwire.runtime.round import Transport
from thinwire.wire import Frame, Ledger, WireError

SMALL = 1 << 16  # bytes of an answer that holds no weights


class Survey:
    """Scores of a state on the clients' own rows, a mean weighted by how many each has: one record a kind of rows.

    A record has them one by one too, as `each`, but for clients that let theirs into a mean alone: their names are
    `withheld`. Where that is one client it is not in the mean either, from which the others would reveal it.
    """

    def __init__(self, transport: Transport, method: Method, run: int, spool: Path, names: Sequence[str] = ()) -> None:
        self.transport, self.method, self.run, self.spool, self.names = transport, method, run, spool, names

    def __call__(self, state: Any, server: Server, held: dict[int, str]) -> list[dict[str, Any]]:
        """Records for evals.jsonl; the bytes of these frames are in them, not in the rounds'."""
        if not self.method.evaluates():
            return []  # its clients never receive the whole model
        ledger = Ledger()

        def frames() -> Iterator[tuple[int, Frame]]:
            for client in server.cohort:
                down = self.method.broadcast(state, server, client, held.get(client))
                frame = wire.encode(down, run=self.run, round=server.round, client=client, spool=self.spool)
                yield client, ledger.down(client, frame)

        scores: dict[int, Scores] = {}
        errors: dict[str, str] = {}
        for reply in self.transport.exchange(frames(), "evaluate"):
            try:
                if reply.frame is None:
                    errors[str(reply.client)] = reply.error or "no reply"
                    continue
                found = wire.decode(Scores, ledger.up(reply.client, reply.frame), SMALL)
                header = reply.frame.header()
                if (header.run, header.client) != (self.run, reply.client) or found.examples < 1:
                    raise WireError("scores of another run, client, or of no rows")
                if not math.isfinite(found.loss):
                    raise WireError("a loss that is no number")
                scores[reply.client] = found
            except WireError as error:
                errors[str(reply.client)] = f"{type(error).__name__}: {error}"
        records: list[dict[str, Any]] = []
        for split, heldout in (("sites", True), ("sites_train", False)):
            group = {client: found for client, found in scores.items() if found.heldout == heldout}
            withheld = [client for client, found in group.items() if found.mean_only]
            if len(withheld) == 1:
                del group[withheld[0]]
                errors[str(withheld[0])] = "the only one whose scores are for a mean alone"
            if group:
                records.append(record(split, [*group.values()]) | self._each(group))
            if group and withheld:
                records[-1]["withheld"] = [self._name(client) for client in withheld]
        for row in records[:1]:
            row.update({"bytes_down": ledger.bytes_down, "bytes_up": ledger.bytes_up})
            if errors:
                row["errors"] = errors
        return records

    def _each(self, group: Mapping[int, Scores]) -> dict[str, Any]:
        return {
            "each": [
                {"id": client, "name": self._name(client), "rows": found.examples}
                | {name: value for name in SCORES if (value := getattr(found, name, None)) is not None}
                for client, found in group.items()
                if not found.mean_only
            ]
        }

    def _name(self, client: int) -> str:
        return self.names[client] if client < len(self.names) else str(client)


def record(split: str, scores: Sequence[Scores]) -> dict[str, Any]:
    """The mean of some clients' scores, weighted by their rows; perplexity of the mean loss."""
    rows = sum(s.examples for s in scores)

    def mean(name: str) -> float | None:
        held = [(s.examples, value) for s in scores if (value := getattr(s, name, None)) is not None]
        return sum(n * value for n, value in held) / sum(n for n, _ in held) if held else None

    means = {name: mean(name) for name in SCORES}
    loss = means["loss"]
    assert loss is not None  # every client has one
    return {
        "split": split,
        **means,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "rows": rows,
        "sites": len(scores),
        "samples": [],
    }
