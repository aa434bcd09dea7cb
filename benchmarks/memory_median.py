"""Peak memory of the server in a round of twenty whole-model replies, under the median and under the plain mean.

    python benchmarks/memory_median.py [--model smollm2-135m-instruct] [--clients 20] [--json FILE]

The replies are FedAvg's, the model's weights in float32 with noise, and lie in files as the transport leaves them; the
state is on the disk, as in a run with sites. Each way is a process that imports, resets the peak, has one round and
reads it: peak resident minus resident after the imports. Needs about 1.3 models of disk a client.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rows import Row, finish

MOST = 1.2  # models


def option(name: str, default: str) -> str:
    """The value of an option of the command line."""
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def prepare(folder: Path, model: str, clients: int) -> int:
    """Write the state and the replies; the bytes of the weights."""
    import torch
    from safetensors import safe_open

    from thinwire import wire
    from thinwire.methods.fedavg import FedAvg, Weights
    from thinwire.model.resolve import resolve

    weights = {}
    for file in sorted(Path(resolve(model)).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            weights |= {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    weights = {name: tensor for name, tensor in weights.items() if tensor.numel()}
    wire.encode(Weights(weights), spool=folder).move_to(folder / "state.frame")
    for client in range(clients):
        draw = torch.Generator().manual_seed(client)
        noisy = {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=draw) for name, tensor in weights.items()}
        reply = FedAvg.Up(noisy, 100, 1.0, 0)
        wire.encode(reply, run=1, round=1, client=client, spool=folder).move_to(folder / f"reply-{client}.frame")
        del noisy, reply
    return sum(4 * tensor.numel() for tensor in weights.values())


def measure(folder: Path, kind: str, clients: int) -> tuple[int, float]:
    """Bytes at the peak of one round in this process, and its seconds."""
    import torch

    from thinwire import memory, wire
    from thinwire.aggregate.mean import Setting, Update
    from thinwire.core import Server
    from thinwire.keys import Key
    from thinwire.methods.fedavg import FedAvg
    from thinwire.runtime.round import Reply, Round, run_round
    from thinwire.runtime.store import VersionStore

    class Recorded:
        """A transport that has all replies already."""

        def exchange(self, frames: Iterable[tuple[int, wire.Frame]], action: str = "train") -> Iterator[Reply]:
            for client, frame in frames:
                frame.remove()
                came = folder / f"came-{kind}-{client}.frame"
                os.link(folder / f"reply-{client}.frame", came)
                yield Reply(client, wire.Frame.in_file(came))

    torch.set_num_threads(1)
    method, spool = FedAvg(aggregation=kind), folder / f"spool-{kind}"  # type: ignore[arg-type]
    spool.mkdir()
    method.aggregation([(0, Update({"w": torch.ones(3)}, 1))], Setting())
    state = wire.decode(method.State, wire.Frame.load(folder / "state.frame"))
    versions = VersionStore(folder / "versions")
    server = Server(None, Key.root(0), 1, 1, tuple(range(clients)), versions)  # type: ignore[arg-type]
    at = Round(1, server, Recorded(), {}, spool)  # type: ignore[arg-type]
    memory.trim()
    before = memory.resident()
    memory.reset()
    began = time.perf_counter()
    state, _ = run_round(method, state, at)
    taken, peak = time.perf_counter() - began, memory.peak() - before
    assert not [visit.error for visit in at.visits.values() if visit.error]
    assert not list(spool.iterdir())
    assert all(torch.isfinite(tensor).all() for tensor in state.weights.values())
    return peak, taken


def main() -> None:
    """Prepare, and have each round in a process of its own."""
    model, clients = option("--model", "smollm2-135m-instruct"), int(option("--clients", "20"))
    if "--measure" in sys.argv:
        print(*measure(Path(option("--folder", "")), option("--measure", ""), clients))  # noqa: T201
        return
    if "--prepare" in sys.argv:
        print(prepare(Path(option("--folder", "")), model, clients))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, __file__, "--folder", folder, "--clients", str(clients), "--model", model]

        def run(*more: str) -> list[str]:
            return subprocess.run([*own, *more], check=True, capture_output=True, text=True).stdout.split()

        size = int(run("--prepare")[0])
        found = {kind: run("--measure", kind) for kind in ("mean", "median")}
    peaks = {kind: int(peak) for kind, (peak, _) in found.items()}
    seconds = {kind: float(taken) for kind, (_, taken) in found.items()}
    what = f"{clients} replies of {model} under the"
    finish(
        [
            Row(f"{what} median, peak memory against {MOST} models", peaks["median"] / 1e6, MOST * size / 1e6, "MB"),
            Row(f"{what} median, peak memory against the mean's", peaks["median"] / 1e6, peaks["mean"] / 1e6, "MB"),
            Row(f"{what} median, seconds against the mean's", seconds["median"], seconds["mean"], "s"),
        ]
    )


if __name__ == "__main__":
    main()
