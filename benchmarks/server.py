"""Replies of FedKSeed that a server takes in, a second and core: 100,000 clients in one round.

    python benchmarks/server.py [--clients N] [--json FILE]

The replies (200 float16 scalars each, all different) are encoded beforehand and go through the round's own checksum,
decode, check and accumulate; drawing each client's directions anew is part of it. Three rounds, of which the fastest
counts. Memory is what this process grows by over a round of all clients, the records of the visits included, against
the bytes of their replies.
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

from thinwire import memory, wire
from thinwire.core import Server
from thinwire.keys import Key
from thinwire.methods.fedkseed import FedKSeed, Steps
from thinwire.perturb.scalars import as_sent
from thinwire.runtime.round import Reply, Round, run_round
from thinwire.runtime.store import VersionStore

TARGET = 20_000
ROUNDS = 3


class Recorded:
    """A transport that has all replies already; how they came is not the server's work."""

    def __init__(self, replies: list[bytes]) -> None:
        self.replies = replies

    def exchange(self, frames: Iterable[tuple[int, wire.Frame]], action: str = "train") -> Iterator[Reply]:
        """The replies, in the order of the clients."""
        return (Reply(client, wire.Frame(data)) for client, data in enumerate(self.replies))


def main() -> None:
    """One round."""
    torch.set_num_threads(1)
    clients = int(sys.argv[sys.argv.index("--clients") + 1]) if "--clients" in sys.argv else 100_000
    method, rng = FedKSeed(steps=200), np.random.default_rng(0)
    replies = []
    for client in range(clients):
        up = Steps(None, *as_sent(rng.normal(0, 20, 200).astype(np.float32), "float16"), 100, 0.5)
        replies.append(bytes(wire.encode(up, run=1, round=1, client=client)))
    with tempfile.TemporaryDirectory() as folder:
        server = Server(None, Key.root(0), 1, 1, tuple(range(clients)), VersionStore(Path(folder)))  # type: ignore[arg-type]
        seconds, grown = [], 0
        for _ in range(ROUNDS):
            at = Round(1, server, Recorded(replies), {})
            before = memory.resident()
            memory.reset()
            begin = perf_counter()
            _, metrics = run_round(method, method.init(server), at)
            seconds.append(perf_counter() - begin)
            grown = grown or memory.peak() - before
            assert not [visit for visit in at.visits.values() if visit.error]
            assert metrics["directions"] > 0
    size = sum(map(len, replies))
    finish(
        [
            Row(f"{clients:,} FedKSeed replies in one round, a second and core", clients / min(seconds), TARGET, "/s"),
            Row(
                f"memory that a round of {clients:,} replies takes, against their bytes", grown / 1e6, size / 1e6, "MB"
            ),
        ]
    )


if __name__ == "__main__":
    main()
