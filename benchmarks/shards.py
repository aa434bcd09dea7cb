"""Peak memory of a FedAvg visit of one process, of two that hold everything each, and of two with shards.

    python benchmarks/shards.py [--json FILE]

SmolLM2-135M in float32, all weights trained by AdamW, two steps of four rows of the demo, cut at 32 tokens. Each
process imports, loads, resets the peak, has its visit and reads it: peak resident minus resident after the imports; of
two the larger one counts. Freed memory goes back to the system at once, on all sides. The reference is the process
alone. The visits' losses are printed too, to see that all sides do the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import Row, finish

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-fedavg.toml"
# glibc keeps what layers give back, and would count all of it as used; a GPU's allocator does not
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SIDES = {"alone": (1, False), "whole": (2, False), "shards": (2, True)}


def measure(sharded: bool, out: Path) -> None:
    """Write the peak and the loss of this process's visit into a folder."""
    import torch

    from thinwire import assemble, config, memory
    from thinwire.core import Client
    from thinwire.keys import Key
    from thinwire.runtime.store import ClientMemory, VersionStore
    from thinwire.train import parallel

    rank = parallel.join()
    torch.set_num_threads(1)
    settings = {"model.shards": str(sharded).lower(), "data.max_length": "32", "method.steps": "2"}
    run = config.load(RECIPE, [f"{key}={value}" for key, value in (settings | {"method.batch_size": "4"}).items()])
    rows = assemble.rows_of(run.data, Key.root(0))
    if sharded:  # its imports are no memory of the visit
        import thinwire.train.shards  # noqa: F401
    before = memory.resident()
    net = assemble.net_of(run)
    data = assemble.dataset(run.data, next(iter(rows.clients.values())), net.tokenizer)
    key = Key.root(1)
    memory.reset()
    client = Client(0, net, data, key, ClientMemory(out / f"memory-{rank}", 1), VersionStore(out / f"versions-{rank}"))
    local = run.method.train(client, 1e-5)
    (out / f"{rank}.json").write_text(json.dumps({"peak": memory.peak() - before, "loss": local.loss}))


def main() -> None:
    """Run all sides, each in processes of its own."""
    if sys.argv[1:2] == ["--visit"]:
        measure(sys.argv[2] == "shards", Path(sys.argv[3]))
        return
    peaks = {}
    for side, (size, _) in SIDES.items():
        with tempfile.TemporaryDirectory() as out:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            command = [sys.executable, *launch, __file__, "--visit", side, out]
            subprocess.run(command, check=True, env=dict(os.environ) | ENVIRONMENT)
            found = [json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"))]
            assert len(found) == size
            peaks[side] = max(each["peak"] for each in found)
            print(side, [round(each["loss"], 6) for each in found])  # noqa: T201
    sides = {"whole": "two processes, each with everything", "shards": "two processes, in shards"}
    finish([Row(f"{words}: peak over one's", peaks[s] / 1e6, peaks["alone"] / 1e6, "MB") for s, words in sides.items()])


if __name__ == "__main__":
    main()
