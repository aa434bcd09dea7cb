"""What the server asks of sites before a run: whether they can take part."""

from __future__ import annotations

import time
from collections.abc import Sequence

from thinwire import wire
from thinwire.federation.transport import NoQuorum, Pieces
from thinwire.runtime.payloads import Hello, Ready
from thinwire.runtime.round import Reply
from thinwire.runtime.survey import SMALL
from thinwire.wire import WireError

PAUSE = 1.0  # seconds between two questions to a site whose node is coming back
PASSING = ("the engine ", "not connected", "the site's worker ")  # what may be over in a moment


class Refusal(NoQuorum):
    """Fewer sites than the quorum can take part; the message has the reason of each that cannot."""


def join(
    transport: Pieces, run: int, clients: int | Sequence[int], names: Sequence[str], quorum: int
) -> dict[str, str]:
    """Ask each of so many sites, or of these, to get ready: it loads its model. Returns why others are absent, by name.

    A site whose node is away or fails is asked again for as long as a round would wait for it. Refusal where fewer
    than `quorum` are ready.
    """
    all_of = range(clients) if isinstance(clients, int) else clients
    absent = dict.fromkeys(all_of, "not connected")
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
    if len(all_of) - len(absent) < min(quorum, len(all_of)):
        why = "".join(f"; {name}: {reason}" for name, reason in reasons.items())
        raise Refusal(f"{len(all_of) - len(absent)} of {len(all_of)} sites have joined, {quorum} must{why}")
    return reasons


def _refused(reply: Reply) -> str:
    """Why a site does not take part, empty where it does."""
    if reply.frame is None:
        return reply.error or "no reply"
    try:
        wire.decode(Ready, reply.frame, SMALL)
        client = reply.frame.header().client
    except WireError as error:
        return f"{type(error).__name__}: {error}"
    return "" if client == reply.client else f"a reply of client {client}"
