"""Who is still busy with the round before, whose reply this round counts, and in what it was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinwire.core import Server
from thinwire.runtime import checkpoint
from thinwire.runtime.job import Job
from thinwire.runtime.membership import Membership
from thinwire.runtime.round import Transport
from thinwire.runtime.seats import Seats


def late_of(
    job: Job, seats: Seats, transport: Transport, states: Path, members: Membership, round: int
) -> dict[int, tuple[Any, Server]]:
    """Client -> the state and the context of the round before, which the checkpoint before it has.

    Who was removed since is waited for no more: what comes from a site that has left the run is in no round.
    """
    busy = transport.under_way(members.now) if job.late else ()
    if not busy:
        return {}
    state = checkpoint.on_disk(states, round - 2, job.method.State)
    return dict.fromkeys(busy, (state, seats.server(round - 1, seats.cohort(job.segments, members.before, round - 1))))
