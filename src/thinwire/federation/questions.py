"""What the server asks of sites beside training: whether they can take part, and how a state scores on their rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from thinwire import wire
from thinwire.core import Method, Reply, Server
from thinwire.federation.payloads import Hello, Ready, Scores
from thinwire.federation.transport import Flower, NoQuorum
from thinwire.records import SCORES
from thinwire.wire import Frame, Ledger, WireError

SMALL = 1 << 16  # bytes of an answer that holds no weights
PAUSE = 1.0  # seconds between two questions to a site whose node is coming back
PASSING = ("the engine ", "not connected", "the site's worker ")  # what may be over in a moment


class Refusal(NoQuorum):
    """Fewer sites than the quorum can take part; the message has the reason of each that cannot."""


def join(transport: Flower, run: int, clients: int, names: Sequence[str], quorum: int) -> dict[str, str]:
    """Ask each site to get ready, which loads its model; returns why the others are absent, by name.

    A site whose node is away or fails is asked again for as long as a round would wait for it. Refusal where fewer
    than `quorum` are ready.
    """
    absent = dict.fromkeys(range(clients), "not connected")
    asked, until = list(absent), time.monotonic() + transport.patience
    while asked:
        hello = [(client, wire.encode(Hello(), run=run, client=client)) for client in asked]
        for reply in transport.ask("join", hello, max_bytes=SMALL, patience=max(0.0, until - time.monotonic())):
            absent[reply.client] = _refused(reply)
            if not absent[reply.client]:
                del absent[reply.client]
        asked = [client for client in asked if absent.get(client, "").startswith(PASSING)]
        if time.monotonic() + PAUSE > until:
            break
        if asked:
            time.sleep(PAUSE)
    reasons = {names[client]: reason for client, reason in absent.items()}
    if clients - len(absent) < min(quorum, clients):
        why = "".join(f"; {name}: {reason}" for name, reason in reasons.items())
        raise Refusal(f"{clients - len(absent)} of {clients} sites have joined, {quorum} must{why}")
    return reasons


def _refused(reply: Reply) -> str:
    """Why a site does not take part, empty where it does."""
    if reply.frame is None:
        return reply.error or "no reply"
    try:
        wire.decode(Ready, reply.frame, SMALL)
        client = wire.peek(reply.frame).client
    except WireError as error:
        return f"{type(error).__name__}: {error}"
    return "" if client == reply.client else f"a reply of client {client}"


class Survey:
    """Scores of a state on the sites' own rows, a mean weighted by how many each has: one record a kind of rows."""

    def __init__(self, transport: Flower, method: Method, run: int, spool: Path) -> None:
        self.transport, self.method, self.run, self.spool = transport, method, run, spool

    def __call__(self, state: Any, server: Server, held: dict[int, str]) -> list[dict[str, Any]]:
        """Records for evals.jsonl; the bytes of these frames are in them, not in the rounds'."""
        if type(self.method).receive is Method.receive:
            return []  # its clients never receive the whole model
        ledger = Ledger()

        def frames() -> Iterator[tuple[int, Frame]]:
            for client in server.cohort:
                down = self.method.broadcast(state, server, client, held.get(client))
                frame = wire.encode(down, run=self.run, round=server.round, client=client, spool=self.spool)
                yield client, ledger.down(client, frame)

        scores: list[Scores] = []
        errors: dict[str, str] = {}
        for reply in self.transport.ask("evaluate", frames(), max_bytes=SMALL):
            try:
                if reply.frame is None:
                    errors[str(reply.client)] = reply.error or "no reply"
                    continue
                found = wire.decode(Scores, ledger.up(reply.client, reply.frame), SMALL)
                header = wire.peek(reply.frame)
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
    """The mean of some sites' scores, weighted by their rows; perplexity of the mean loss."""
    rows = sum(s.examples for s in scores)

    def mean(name: str) -> float | None:
        held = [(s.examples, value) for s in scores if (value := getattr(s, name, None)) is not None]
        return sum(n * value for n, value in held) / sum(n for n, _ in held) if held else None

    means = {name: mean(name) for name in SCORES}
    loss = means["loss"]
    assert loss is not None  # every site has one
    return {
        "split": split,
        **means,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "rows": rows,
        "sites": len(scores),
        "samples": [],
    }
