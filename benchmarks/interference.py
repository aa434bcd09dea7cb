"""Do blocks of layers get in each other's way? Cosines of what a block's training changes, alone and beside others.

    python benchmarks/interference.py [model.path=gemma3-270m] [method.lr=1e-4 ...] [--json FILE]

recipes/demo-fedcybgd.toml, 20 AdamW steps of its first client from the start model. A number is the cosine of what
a block changes by when it is trained alone with what it changes by on the same batches when all layers are trained, or
its neighbour, or the block half a model away. The reference is what other rows alone do to it: alone, on other batches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rows import Row, finish
from torch import Tensor

from thinwire import assemble, config
from thinwire.keys import Key
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.model.blocks import blocks_of, layer_of, layers_of
from thinwire.train.local import Rule, train_locally

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-fedcybgd.toml"
Change = dict[str, Tensor]


def alike(one: Change, other: Change) -> float:
    """Cosine of two changes, over the tensors of the first."""
    product = sum(float((move * other[name]).sum()) for name, move in one.items())
    sizes = [sum(float(side[name].square().sum()) for name in one) for side in (one, other)]
    return product / math.sqrt(sizes[0] * sizes[1])


def main() -> None:
    """All rows."""
    run = config.load(RECIPE, [argument for argument in sys.argv[1:] if "=" in argument])
    method = run.method
    assert isinstance(method, FedCyBGD)
    net, rows = assemble.net_of(run), assemble.rows_of(run.data, Key.root(run.seed))
    data = assemble.client_data(run, next(iter(rows.clients.values())), net)
    path = layers_of(net.model)
    of = {name: layer_of(name, path) for name in net.names}
    blocks = blocks_of(1 + max(layer for layer in of.values() if layer is not None), method.blocks)

    def trained(layers: Sequence[int], batches: str = "batches") -> Change:
        net.reset()
        own = {name: p for name, p in net.parameters() if of[name] in layers}
        for name, p in net.parameters():
            p.requires_grad_(name in own)
        drawn = data.batches(Key.root(0).fold(batches), method.batch_size)
        train_locally(net.model, list(own.values()), drawn, Rule("adamw", method.lr, method.steps, clip=method.clip))
        return {name: p.detach() - net.base[name] for name, p in own.items()}

    whole = trained(range(len(of)))
    found: dict[str, list[float]] = {"all layers": [], "its neighbour": [], "one far away": []}
    chance = []
    for number, block in enumerate(blocks):
        alone = trained(block)
        chance.append(alike(alone, trained(block, "others")))
        found["all layers"].append(alike(alone, whole))
        for name, steps in (("its neighbour", 1), ("one far away", len(blocks) // 2)):
            beside = blocks[(number + steps) % len(blocks)] if number + steps < len(blocks) else blocks[number - steps]
            found[name].append(alike(alone, trained([*block, *beside])))
    of_each = [
        Row(f"block {number} beside {name}", value, chance[number], "cosine")
        for name, values in found.items()
        for number, value in enumerate(values)
    ]
    means = [Row(f"mean over blocks, beside {name}", fmean(v), fmean(chance), "cosine") for name, v in found.items()]
    finish(of_each + means)


if __name__ == "__main__":
    main()
