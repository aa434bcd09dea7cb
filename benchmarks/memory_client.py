"""Peak memory of a FedKSeed client in a process of its own, over plain inference on the same batches.

    python benchmarks/memory_client.py [--json FILE]

Each side is a process that imports, loads SmolLM2-135M, resets the peak, does its work, and reads it: peak resident
minus resident after the imports. fp32, two threads, batches of 16 rows of the demo.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

from rows import Row, finish

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-fedkseed.toml"


def measure(side: str) -> int:
    """Bytes at the peak, of one side, in this process."""
    import torch

    from thinwire import assemble, config, memory
    from thinwire.core import Client
    from thinwire.keys import Key
    from thinwire.methods.fedkseed import FedKSeed
    from thinwire.runtime.store import ClientMemory, VersionStore
    from thinwire.train.objective import loss

    torch.set_num_threads(2)
    run = config.load(RECIPE)
    rows = assemble.rows_of(run.data, Key.root(0))
    before = memory.resident()
    net = assemble.net_of(run)
    data = assemble.dataset(run.data, next(iter(rows.clients.values())), net.tokenizer)
    key, folder = Key.root(1), Path("unused")
    memory.reset()
    if side == "inference":
        with torch.inference_mode():
            for batch in islice(data.batches(key.fold("batches"), 16), 4):
                loss(net.model, batch)
    else:
        method = FedKSeed(seeds=4096, steps=4, batch_size=16, lr=1e-4, eps=1e-3, wire="paper")
        gains = torch.zeros(4096)
        gains[:8] = 1e-4
        down = method.Down(pool=1, draws=2, lr=1e-4, shrink=1.0, gains=gains)
        client = Client(0, net, data, key, ClientMemory(folder, 1), VersionStore(folder))
        method.client_update(down, client)
    return memory.peak() - before


def main() -> None:
    """Run both sides, each in a process of its own."""
    if len(sys.argv) == 2 and sys.argv[1] in ("inference", "client"):
        print(measure(sys.argv[1]))  # noqa: T201
        return
    found = {
        side: int(subprocess.run([sys.executable, __file__, side], check=True, capture_output=True).stdout)
        for side in ("inference", "client")
    }
    finish([Row("FedKSeed client, peak memory over inference", found["client"] / 1e6, found["inference"] / 1e6, "MB")])


if __name__ == "__main__":
    main()
