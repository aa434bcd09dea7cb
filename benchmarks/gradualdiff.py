"""GradualDiff-Fed against FedAvg on SmolLM2-135M: bytes of a client that returns, seconds, the server's memory.

    python benchmarks/gradualdiff.py [--json FILE]

Peers hold bfloat16 weights and train in float32 (20 AdamW steps of 8 rows of the film desk, two clients). Bytes are
those of the second round, both ways, against frames of bfloat16 FedAvg weights; seconds and memory against FedAvg in
float32, each side in a process of its own. The server's memory is that of a round of 20 clients over one of 2, where
each client sends the same difference.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rows import Row, finish

from thinwire import assemble, config, memory, wire
from thinwire.compare.measure import Cost, measure
from thinwire.compress.exact import ulp
from thinwire.core import Server
from thinwire.keys import Key
from thinwire.methods.fedavg import Weights
from thinwire.methods.gradualdiff import Difference
from thinwire.runtime.round import Reply, Round, run_round
from thinwire.runtime.store import VersionStore

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-gradualdiff.toml"
RATES = (1e-6, 1e-5, 4e-5)
LOSSY = (
    ("top 3 % in 4 bits", "method.codec=topk", "method.share=0.03", "method.bits=4"),
    ("top 1 % in 4 bits", "method.codec=topk", "method.share=0.01", "method.bits=4"),
    ("eden in 1 bit", "method.codec=eden", "method.bits=1"),
)
SETTINGS = ["method.steps=20", "method.batch_size=8", "data.clients=2", "rounds=3"]


class Again:
    """A transport whose every client answers with the same reply, whatever it is sent."""

    def __init__(self, up: object, folder: Path) -> None:
        self.up, self.folder = up, folder

    def exchange(self, frames: Iterable[tuple[int, wire.Frame]], action: str = "train") -> Iterator[Reply]:
        """One reply at a time."""
        for client, frame in frames:
            header = frame.header()
            frame.remove()
            yield Reply(client, wire.encode(self.up, run=1, round=header.round, client=client, spool=self.folder))


def serve(clients: int, folder: Path) -> float:
    """MB that the server's process takes at its peak in a round of so many clients, less what the imports took."""
    run = config.load(RECIPE, ["data.clients=2"])
    before = memory.resident()
    net = assemble.net_of(run)
    versions, ids = VersionStore(folder / "versions"), tuple(range(clients))
    server = Server(net, Key.root(0), 1, 1, ids, versions)
    state = run.method.init(server)
    generator, coded = torch.Generator().manual_seed(0), {}
    for name, old in state.weights.items():
        new = (old.float() + 1e-5 * torch.randn(old.shape, generator=generator)).to(old.dtype)
        coded[name] = torch.frombuffer(bytearray(ulp.encode(new, old)), dtype=torch.uint8)
    up = Difference(state.version, 0, coded, 10, 0.5, 0)
    memory.reset()
    at = Round(1, server, Again(up, folder), dict.fromkeys(ids, state.version), folder)
    run_round(run.method, state, at)
    assert not [visit for visit in at.visits.values() if visit.error]
    return (memory.peak() - before) / 1e6


def served(clients: int) -> float:
    """The same, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--serve", str(clients), folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def priced(*settings: str) -> Cost:
    """What the recipe under these settings costs either side."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(config.load(RECIPE, [*SETTINGS, *settings]), (0, 1), Path(folder))


def main() -> None:
    """All rows."""
    if "--serve" in sys.argv:
        print(serve(int(sys.argv[-2]), Path(sys.argv[-1])))  # noqa: T201
        return
    run = config.load(RECIPE)
    weights = {name: tensor.bfloat16() for name, tensor in assemble.net_of(run).base.items()}
    whole = 2 * len(wire.encode(Weights(weights))) / 1e6
    plain = priced("method.name=fedavg", f"method.lr={RATES[-1]}")
    rows = []
    for lr in RATES:
        cost = priced(f"method.lr={lr}")
        rows.append(Row(f"lossless, lr {lr:g}, down and up", cost.returning_bytes / 1e6, whole, "MB"))
    rows += [
        Row("lossless, a visit of 20 steps", cost.client_seconds, plain.client_seconds, "s"),
        Row("lossless, the server in a round of two", cost.server_seconds, plain.server_seconds, "s"),
        Row("lossless, peak memory of a client", cost.client_memory / 1e6, plain.client_memory / 1e6, "MB"),
        Row("lossless, peak memory of the server", cost.server_memory / 1e6, plain.server_memory / 1e6, "MB"),
    ]
    for name, *code in LOSSY:
        cost = priced(f"method.lr={RATES[-1]}", *code)
        rows.append(Row(f"{name}, down and up", cost.returning_bytes / 1e6, whole, "MB"))
    rows.append(Row("the server's memory, 20 clients over 2", served(20), served(2), "MB"))
    finish(rows)


if __name__ == "__main__":
    main()
