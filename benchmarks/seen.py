"""How much of the server's model does a FedCyBGD client see? Shares of weights, after each of three cycles.

    python benchmarks/seen.py [method.shown=0.5 method.veiled=true ...] [--json FILE]

recipes/demo-fedcybgd.toml in bfloat16, read off the raw frames. `exact`: at the end of the cycle the last value that a
client was sent of a weight, or has learnt itself, is the server's. `ever seen`: it was sent some value, maybe an
old one. Of all weights in layers; the mean over clients, and the client that knows most in place of a reference.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from rows import Row, finish
from torch import Tensor

from thinwire import assemble, config, wire
from thinwire.keys import Key
from thinwire.methods.fedcybgd import Block, FedCyBGD, Proxy
from thinwire.model import shrink
from thinwire.model.anatomy import Layout
from thinwire.model.blocks import layer_of, layers_of
from thinwire.model.net import Net
from thinwire.model.shrink import Cut
from thinwire.runtime.endpoint import ACTIONS, Endpoint
from thinwire.runtime.inprocess import InProcess
from thinwire.runtime.round import Reply, Round, run_round
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import ClientMemories, VersionStore
from thinwire.wire import Frame

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-fedcybgd.toml"
CYCLES = 3


@dataclass
class Known:
    """What a client knows: the last value of each weight that it has seen, nothing (NaN) where it has seen none."""

    weights: dict[str, Tensor]

    def learn(self, name: str, values: Tensor, places: Tensor) -> None:
        """Values of a tensor at these places of the whole one, flat."""
        self.weights[name].view(-1)[places.flatten()] = values.flatten()

    def shares(self, now: dict[str, Tensor]) -> tuple[float, float]:
        """Of all weights, those known as they are now, and those that were ever seen."""
        exact = sum(int((self.weights[name] == new).sum()) for name, new in now.items())
        ever = sum(int((~self.weights[name].isnan()).sum()) for name in now)
        return exact / sum(new.numel() for new in now.values()), ever / sum(new.numel() for new in now.values())


@dataclass
class Watched:
    """A transport that reads the frames it carries, raw ones, down and up."""

    inner: InProcess
    method: FedCyBGD
    net: Net
    places: dict[str, Tensor]
    layout: Layout
    known: dict[int, Known] = field(default_factory=dict)

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        for client, frame in frames:
            down = wire.decode(Proxy, frame)
            cut, known = Cut.unpacked(down.cut, self.layout), self.known[client]
            sent = self.method._decoded(down, self.net, None, self.method._blocks(self.net))
            for name, places in self.places.items():
                part = shrink.sliced(name, places, cut, self.layout)
                if part is not None:
                    known.learn(name, sent[name], part)
            for reply in self.inner.exchange([(client, frame)]):
                assert reply.frame is not None, reply.error
                up = wire.decode(Block, reply.frame)
                for name in up.changes:
                    if name in self.places:
                        known.learn(name, up.changes[name], self.places[name])
                yield reply


def shares(net: Net, run: config.Run, folder: Path) -> Iterator[list[tuple[float, float]]]:
    """Of each client, after each cycle."""
    method, path = run.method, layers_of(net.model)
    assert isinstance(method, FedCyBGD)
    rows = assemble.rows_of(run.data, Key.root(run.seed))
    data = assemble.clients_data(run, rows, net)
    versions, memories = VersionStore(folder / "versions", 2), ClientMemories(folder / "clients")

    turns = CYCLES * method.blocks
    seats = Seats(Key.root(run.seed), turns, net, versions, data, memories)
    trained = [name for name in net.names if layer_of(name, path) is not None]
    places = {name: torch.arange(net.base[name].numel()).view(net.base[name].shape) for name in trained}
    blank = {name: torch.full(places[name].shape, torch.nan, dtype=torch.bfloat16) for name in trained}
    known = {id: Known({name: tensor.clone() for name, tensor in blank.items()}) for id in range(len(data))}
    transport = Watched(
        InProcess(Endpoint(method, seats, ACTIONS)), method, net, places, Layout.of(net.model, path), known
    )
    state = method.init(seats.server(0))
    for turn in range(1, turns + 1):
        id = (turn - 1) % len(data)
        state, _ = run_round(method, state, Round(0, seats.server(turn, (id,)), transport, {}, folder))
        if turn % method.blocks == 0:
            yield [one.shares({name: state.weights[name] for name in trained}) for one in known.values()]


def main() -> None:
    """All rows."""
    raw = ["model.dtype=bfloat16", "method.start=sent", "method.coded=false"]
    run = config.load(RECIPE, [*raw, *(argument for argument in sys.argv[1:] if "=" in argument)])
    folder, found = Path(tempfile.mkdtemp()), []
    try:
        for cycle, each in enumerate(shares(assemble.net_of(run), run, folder), 1):
            for name, of in zip(("exact", "ever seen"), zip(*each, strict=True), strict=True):
                found.append(Row(f"{name}, after {cycle} cycles, mean; most", fmean(of), max(of), "of the weights"))
    finally:
        shutil.rmtree(folder)
    finish(found)


if __name__ == "__main__":
    main()
