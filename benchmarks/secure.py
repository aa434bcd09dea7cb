"""What secure sums cost: bytes of a round over a plain one, and seconds of masks and of keys beside its training.

    python benchmarks/secure.py [--clients 50] [--numbers 131072]

A round of simulated clients, one after another in this process, whose visits take no time: what is left is what a plain
and a masked round take themselves. Keys are agreement, sharing and recovery; masks are numbers, streams and sums.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np
from rich.console import Console

from thinwire.privacy.masks import Pair, joined, least_of, neighbours, pair_mask, sealed, self_mask, split, system
from thinwire.privacy.terms import Sums, Term, even

PLACE = b"a benchmark's place, 32 bytes long"


def terms_of(kind: str, count: int) -> Mapping[str, Term]:
    """The terms of a FedKSeed visit of so many scalars, or of so many signs."""
    if kind == "fedkseed":
        return {"scalars": even((count,), 6e4, 24)}
    return {"numbers": Term((count,), 1.0, 0, 1), "scales": Term((-(-count // 1024),), 2.0**-30, 0, 1 << 31)}


def measure(kind: str, count: int, clients: int, near: int | None) -> dict[str, float]:
    """Seconds of all clients and the server of one round, and bytes of a client's numbers."""
    sums, seconds = Sums(terms_of(kind, count), clients), dict.fromkeys(("plain", "keys", "masks"), 0.0)
    generator = np.random.default_rng(0)
    numbers = {
        name: generator.integers(term.low, term.high, sums.sizes[name], endpoint=True)
        for name, term in sums.terms.items()
    }
    clock = time.perf_counter()
    total = sums.zeros()
    for _ in range(clients):  # in the open: the same whole numbers, packed, unpacked and added up
        sums.add(total, sums.unpack(sums.pack(sums.words(numbers))))
    seconds["plain"], clock = time.perf_counter() - clock, time.perf_counter()

    ids, plain = range(clients), sums.sums(total, clients)
    graph = neighbours(list(ids), near, [int(n) for n in generator.permutation(clients)])
    pairs = {id: (Pair(system(16)), Pair(system(16)), system(16)) for id in ids}
    halves = {id: (seals.public, masks.public) for id, (seals, masks, _) in pairs.items()}
    least = least_of(len(graph[0]) + 1, 2 / 3)
    own, agreed = {}, {}
    for id, (seals, masks, secret) in pairs.items():
        own[id] = split(secret, len(graph[id]) + 1, least)
        shares = split(masks.seed, len(graph[id]) + 1, least)
        for at, peer in enumerate(graph[id]):
            sealed(seals, halves[peer][0], PLACE, id, peer, own[id][at] + shares[at])
            agreed[id, peer] = pair_mask(masks, halves[peer][1], PLACE, id, peer)
    recovered = {id: joined(dict(enumerate(own[id][:least])), least) for id in ids}
    seconds["keys"], clock = time.perf_counter() - clock, time.perf_counter()

    total = sums.zeros()
    for id in ids:
        words = sums.words(numbers)
        sums.mask(words, self_mask(pairs[id][2], PLACE, id), 1)
        for peer in graph[id]:
            sums.mask(words, agreed[id, peer], 1 if id < peer else -1)
        sums.add(total, sums.unpack(sums.pack(words)))
    for id in ids:
        sums.mask(total, self_mask(recovered[id], PLACE, id), -1)
    seconds["masks"] = time.perf_counter() - clock
    assert all((plain[name] == sum).all() for name, sum in sums.sums(total, clients).items())
    return seconds | {"bytes": sums.nbytes}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--numbers", type=int, default=1 << 17)
    args = parser.parse_args()
    console = Console(width=120)
    console.print(f"{args.clients} clients, seconds a round (all clients and the server)")
    console.print(
        "| what | neighbours | plain | keys | masks | bytes of a client | over plain |\n|---|---|---|---|---|---|---|"
    )
    for kind, count, bits in (("fedkseed", 200, 16), ("onebit", args.numbers, 1)):
        plain = count * bits / 8 + (2 * -(-count // 1024) if kind == "onebit" else 0)
        for near in (None, 12):
            found = measure(kind, count, args.clients, near)
            times = " | ".join(f"{found[name]:.2f}" for name in ("plain", "keys", "masks"))
            size = f"{found['bytes']:,.0f} | {found['bytes'] / plain:.2f}"
            console.print(f"| {kind}, {count:,} numbers | {near or 'all'} | {times} | {size} |")


if __name__ == "__main__":
    main()
