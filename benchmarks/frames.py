"""Bytes of a FedKSeed client and round, newcomer included, against the paper's count.

    python benchmarks/frames.py [--json FILE]

Forty rounds of eight clients are aggregated for real, with normal scalars of spread 20 in place of measured ones: of
all laws of one spread the normal one is the hardest to pack. The frames are those of the last round, to a client that
holds nothing and to one that has the version before.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Row, finish

from thinwire import wire
from thinwire.keys import Key
from thinwire.methods.fedkseed import FedKSeed, Steps
from thinwire.perturb.scalars import as_sent
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import VersionStore

ROUNDS, CLIENTS = 40, 8


def frames(method: FedKSeed, folder: Path) -> dict[str, int]:
    """Bytes down and up in the last round: to a newcomer, and to who was there before."""
    rng, seats = np.random.default_rng(0), Seats(Key.root(0), ROUNDS, versions=VersionStore(folder))
    server = seats.server(0, range(CLIENTS))
    state, held = method.init(server), None
    found = {}
    for round in range(1, ROUNDS + 1):
        server = seats.server(round, server.cohort)
        replies = []
        for client in server.cohort:
            seeds = torch.from_numpy(rng.integers(method.seeds, size=method.steps).astype(np.int32))
            scalars = as_sent(rng.normal(0, 20, method.steps).astype(np.float32), method._form)
            replies.append((client, Steps(seeds if method.wire == "paper" else None, *scalars, 1000, 0.5)))
        header: dict[str, Any] = {"run": 2**31, "round": round, "client": 199}
        up = len(wire.encode(replies[0][1], **header, held=state.version))
        for name, version in (("newcomer", None), ("returning", held)):
            found[name] = up + len(wire.encode(method.broadcast(state, server, 0, version), **header))
        held = state.version
        state, _ = method.aggregate(state, server, replies)
    return found


def main() -> None:
    """Aggregate, encode and count."""
    rows = []
    for pro, seeds, paper in ((False, 4096, 17_988), (True, 1024, 9_796)):
        for form, scalars in (("paper", "float32"), ("thin", "float16"), ("thin", "int8")):
            method = FedKSeed(seeds=seeds, pro=pro, steps=200, lr=1e-5, wire=form, scalars=scalars)  # type: ignore[arg-type]
            with tempfile.TemporaryDirectory() as folder:
                for client, size in frames(method, Path(folder)).items():
                    if form == "thin" or client == "newcomer":
                        what = (
                            f"FedKSeed{'-Pro' if pro else ''}, K = {seeds}, 200 steps, {form} wire, {scalars}, {client}"
                        )
                        rows.append(Row(what, size, paper, "B"))
    finish(rows)


if __name__ == "__main__":
    main()
