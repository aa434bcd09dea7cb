"""Replies of FedKSeed that a server takes in, a second and core: 100,000 clients in one round.

    python benchmarks/server.py [--clients N] [--json FILE]

The replies (200 float16 scalars each, all different) are encoded beforehand and go through the round's own checksum,
decode, check and accumulate; drawing each client's directions anew is part of it. Memory is the growth of this process
over the round, to show that it does not depend on the number of clients.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from rows import Row, finish

from thinwire import wire
from thinwire.core import Reply, Round, Server, run_round
from thinwire.keys import Key
from thinwire.methods.fedkseed import FedKSeed, Steps, rounded
from thinwire.runtime.store import VersionStore

TARGET = 20_000


class Recorded:
    """A transport that has all replies already; how they came is not the server's work."""

    def __init__(self, replies: list[bytes]) -> None:
        self.replies = replies

    def exchange(self, frames: Iterable[tuple[int, wire.Frame]]) -> Iterator[Reply]:
        """The replies, in the order of the clients."""
        return (Reply(client, frame) for client, frame in enumerate(self.replies))


def main() -> None:
    """One round."""
    torch.set_num_threads(1)
    clients = int(sys.argv[sys.argv.index("--clients") + 1]) if "--clients" in sys.argv else 100_000
    method, rng = FedKSeed(steps=200), np.random.default_rng(0)
    replies = []
    for client in range(clients):
        up = Steps(None, *rounded(rng.normal(0, 20, 200).astype(np.float32), "float16"), 100, 0.5)
        frame = wire.encode(up, run=1, round=1, client=client)
        assert isinstance(frame, bytes)
        replies.append(frame)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(None, Key.root(0), 1, 1, tuple(range(clients)), VersionStore(Path(folder)))  # type: ignore[arg-type]
        at = Round(1, server, Recorded(replies), {})
        state = method.init(server)
        begin = perf_counter()
        state, metrics = run_round(method, state, at)
        seconds = perf_counter() - begin
    assert not [visit for visit in at.visits.values() if visit.error]
    assert metrics["directions"] > 0
    finish([Row(f"{clients:,} FedKSeed replies in one round, a second and core", clients / seconds, TARGET, "/s")])


if __name__ == "__main__":
    main()
