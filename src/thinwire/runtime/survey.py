"""Evaluation at the clients: how a state scores on their own rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    """Scores of a state on the clients' own rows, a mean weighted by how many each has: one record a kind of rows."""

    def __init__(self, transport: Transport, method: Method, run: int, spool: Path) -> None:
        self.transport, self.method, self.run, self.spool = transport, method, run, spool

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

        scores: list[Scores] = []
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
                scores.append(found)
            except WireError as error:
                errors[str(reply.client)] = f"{type(error).__name__}: {error}"
        groups = {"sites": [s for s in scores if s.heldout], "sites_train": [s for s in scores if not s.heldout]}
        records = [record(split, group) for split, group in groups.items() if group]
        for row in records[:1]:
            row.update({"bytes_down": ledger.bytes_down, "bytes_up": ledger.bytes_up})
            if errors:
                row["errors"] = errors
        return records


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
