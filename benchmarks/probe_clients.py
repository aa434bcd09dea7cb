"""Whether clients that cannot hold activations help those that can: probes beside backward passes in rounds of onebit.

    python benchmarks/probe_clients.py FOLDER [--numbers 512 4096 32768] [--seeds 0 1 2] [--rounds 6] [--probes 8]
        [--eps 1e-2] [--sides few mixed ...] [--path MODEL] [--json FILE]

Eight offices of the demo, SmolLM2-135M in bfloat16. Two of them train with a backward pass. `few`: they are alone.
`mixed`: the six others answer with probes, weighed by the cosine that these are expected to have with the gradient.
`equal`: so, but a probing client counts as much as another. `probes`: all eight probe. `all`: all eight have a backward
pass. Each row is the best held-out loss of a side over the rounds, its reference that of `few`. Each cell of numbers,
side and seed is a file in FOLDER once it has ended: the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rows import Row, finish

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-onebit.toml"
BACKWARD = (0, 1)  # clients with a backward pass, but on the sides that have none or nothing else
SIDES = ("few", "mixed", "equal", "probes", "all")


def cell(side: str, numbers: int, seed: int, given: argparse.Namespace) -> list[float]:
    """The held-out loss before the first round and after each."""
    from thinwire import assemble, config
    from thinwire.evaluate.loss import mean_loss
    from thinwire.keys import Key
    from thinwire.runtime.seats import Seats
    from thinwire.runtime.store import ClientMemories, VersionStore

    tree = config.read(RECIPE, [f"seed={seed}", "model.dtype=bfloat16", f"rounds={given.rounds}", "threads=2"])
    tree["model"]["view"]["numbers"] = numbers
    if given.path:
        tree["model"]["path"] = given.path
    clients = range(tree["data"]["clients"])
    probing = {"few": (), "all": (), "probes": clients}.get(side, [id for id in clients if id not in BACKWARD])
    tree["method"] |= {"gradient": dict.fromkeys(map(str, probing), "probe"), "probes": given.probes, "eps": given.eps}
    run, rows = assemble.prepared(config.parse(tree))
    start = assemble.begin(run, rows)
    net, half = start.net, run.method
    data, (split,) = assemble.clients_data(run, rows, net), assemble.splits_of(run, rows, net)
    cohort, held, losses = BACKWARD if side == "few" else tuple(clients), dict[int, str](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        stores = VersionStore(Path(folder) / "versions", 64), ClientMemories(Path(folder) / "clients")
        seats = Seats(
            Key.root(run.seed), run.rounds, net, stores[0], data, stores[1], lambda client, _: held.get(client)
        )
        state: Any = half.init(seats.server(0))

        def measured() -> float:
            half.materialise(state, net)
            return mean_loss(net.model, split.data, run.eval.batch_size)[0]

        losses.append(measured())
        for round in range(1, run.rounds + 1):
            server, replies = seats.server(round, cohort), []
            for id in cohort:
                client = seats.client(id, round)
                up: Any = half.client_update(half.broadcast(state, server, id, held.get(id)), client)
                half.check(state, id, up)
                held[id] = str(client.held)
                stores[1].commit(client.memory, id)
                replies.append((id, replace(up, probes=None) if side == "equal" else up))
            state, _ = half.aggregate(state, server, iter(replies))
            losses.append(measured())
            print(f"{numbers} {side} seed {seed} round {round}: {losses[-1]:.4f}", flush=True)  # noqa: T201
    return losses


def main() -> None:
    """What is missing of the cells, and all their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--numbers", type=int, nargs="+", default=[512, 4096, 32768])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--path", default="")
    parser.add_argument("--json")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    best: dict[tuple[int, str], list[float]] = {}
    for seed in given.seeds:
        for numbers in given.numbers:
            for side in given.sides:
                settings = f"{numbers}-{side}-{seed}-{given.rounds}-{given.probes}-{given.eps:g}"
                file = given.folder / f"{settings}.json"
                if not file.exists():
                    losses = cell(side, numbers, seed, given)
                    partial = file.with_suffix(".part")
                    partial.write_text(json.dumps(losses) + "\n")
                    partial.rename(file)
                best.setdefault((numbers, side), []).append(min(json.loads(file.read_text())[1:]))
    rows = []
    for (numbers, side), found in best.items():
        few = fmean(best.get((numbers, "few"), [math.nan]))
        rows.append(Row(f"{side}, {numbers:,} numbers, {len(found)} seeds", fmean(found), few, "nats"))
    finish(rows)


if __name__ == "__main__":
    main()
