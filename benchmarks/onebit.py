"""What onebit costs a client and a server: peak memory and seconds a step beside FedAvg and FedIT, replies a second.

    python benchmarks/onebit.py [--json FILE]

Each client is a process that imports, loads SmolLM2-135M in bfloat16, resets the peak, makes a visit of four steps, and
reads it: peak resident minus resident after the imports. A step is the difference of visits of two and of eight steps.
Batches of 16 rows of the demo, two threads. The server takes replies in one process, one thread, decoded and checked
as a round does; the reference is half of 10,000 a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any

from rows import Row, finish

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-onebit.toml"
SIDES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedavg": ({"name": "fedavg"}, {"kind": "full"}),
    "fedit": ({"name": "fedavg"}, {"kind": "lora", "rank": 8}),
    "factors": ({"name": "onebit"}, {"kind": "tied", "numbers": 32768}),
    "weights": ({"name": "onebit"}, {"kind": "tied", "numbers": 32768, "over": "weights"}),
}
NUMBERS = (32768, 115200)


def client(side: str) -> dict[str, float]:
    """Bytes at the peak and seconds a step of one side, in this process."""
    import torch

    from thinwire import assemble, config, memory
    from thinwire.keys import Key
    from thinwire.methods import METHODS
    from thinwire.runtime.seats import Seats
    from thinwire.runtime.store import ClientMemories, VersionStore

    torch.set_num_threads(2)
    method, view = SIDES[side]
    tree = config.read(RECIPE, ["model.dtype=bfloat16", "threads=2"])
    tree["model"]["view"] = view
    tree["method"] = {**method, "steps": 4, "batch_size": 16, "lr": 1e-4}
    run = config.parse(tree)
    rows = assemble.rows_of(run.data, Key.root(0))
    before = memory.resident()
    net = assemble.net_of(run)
    data = assemble.dataset(run.data, next(iter(rows.clients.values())), net.tokenizer)
    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, memories = VersionStore(Path(folder) / "versions"), ClientMemories(Path(folder) / "clients")
        seats = Seats(Key.root(1), 4, net, store, [data], memories)
        memory.reset()
        peak = 0
        for round, steps in enumerate((4, 2, 8, 2, 8), 1):
            half = METHODS[tree["method"]["name"]].model_validate({**tree["method"], "steps": steps})
            state = half.init(seats.server(0))
            down = half.broadcast(state, seats.server(round, (0,)), 0, None)
            at = perf_counter()
            half.client_update(down, seats.client(0, round))
            seconds[steps] = min(seconds.get(steps, 1e9), perf_counter() - at)
            peak = peak or memory.peak() - before
            del state, down
    return {"memory": peak, "step": (seconds[8] - seconds[2]) / 6}


def server(count: int) -> float:
    """Replies a second, of that many numbers."""
    import torch

    from thinwire import wire
    from thinwire.core import Server
    from thinwire.keys import Key
    from thinwire.methods.onebit import Learnt, OneBit

    torch.set_num_threads(1)
    method = OneBit()
    net: Any = SimpleNamespace(size=count)
    store: Any = SimpleNamespace(put=lambda tensors: "0" * 32)
    seat = Server(net, Key.root(0), 1, 10, (0,), store)
    state, code = method.init(seat), method.code.code()
    signs = [torch.frombuffer(bytearray(code.encode(torch.randn(count), 0)), dtype=torch.uint8) for _ in range(50)]
    frames = [wire.encode(Learnt(change, 100, 1.0, 0), run=1, round=1, client=i) for i, change in enumerate(signs)]

    def replies(times: int) -> Any:
        for _ in range(times):
            for i, frame in enumerate(frames):
                up = wire.decode(Learnt, frame)
                method.check(state, i, up)
                yield i, up

    method.aggregate(state, seat, replies(1))  # compiled
    at = process_time()
    method.aggregate(state, seat, replies(100))
    return 5000 / (process_time() - at)


def main() -> None:
    """Run all sides, each in a process of its own."""
    if len(sys.argv) == 2 and sys.argv[1] in SIDES:
        print(json.dumps(client(sys.argv[1])))  # noqa: T201
        return
    found = {
        side: json.loads(subprocess.run([sys.executable, __file__, side], check=True, capture_output=True).stdout)
        for side in SIDES
    }
    rows = []
    for side, other in (("factors", "fedit"), ("weights", "fedavg"), ("weights", "fedit")):
        mine, theirs = found[side], found[other]
        title = f"tied over {side}, against {other}"
        rows.append(Row(f"peak memory, {title}", mine["memory"] / 1e6, theirs["memory"] / 1e6, "MB"))
        rows.append(Row(f"a step, {title}", mine["step"], theirs["step"], "s"))
    rows += [Row(f"server, replies of {count:,} numbers", server(count), 5000, "replies/s") for count in NUMBERS]
    finish(rows)


if __name__ == "__main__":
    main()
