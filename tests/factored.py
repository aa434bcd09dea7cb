"""What tests of methods on LoRA factors compare with: products in float64, of the replies as they travelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from federation import Federation, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.core import Method
from thinwire.model.net import Net
from thinwire.model.views import Lora
from thinwire.wire import Frame

TARGETS = ("q_proj", "v_proj", "down_proj")


def lora_net(folder: Path, rank: int = 4, **fields: Any) -> Net:
    """The tiny model with factors beside three of its layers."""
    dtype = fields.pop("dtype", "float32")
    tiny_net(folder)
    view = Lora(rank=rank, alpha=2.0 * rank, targets=TARGETS, **fields)
    return Net.open(str(folder), dtype, remember=True, view=view)


class Watched(Federation):
    """A federation that keeps the last round's replies, by client."""

    ups: dict[int, Any]

    def step(self, cohort: Any = None) -> Any:
        """See Federation."""
        self.ups = {}

        def seen(frame: Frame) -> None:
            header = frame.header()
            if header.kind == wire.payload.kind_of(self.method.Up):
                self.ups[header.client] = wire.decode(self.method.Up, frame)

        self.watch = seen
        return super().step(cohort)


def watched(method: Method, net: Net, folder: Path, **fields: Any) -> Watched:
    """The federation of a method."""
    return Watched(method, net, folder, **fields)


def products(federation: Watched, by_examples: bool = True) -> dict[str, Tensor]:
    """The exact mean of the last replies' s B A, float64, by layer."""
    sizes = {client: federation.sizes[client] if by_examples else 1 for client in federation.ups}
    found: dict[str, Tensor] = {}
    for layer, place in federation.net.adapted().items():
        total = torch.zeros(1, dtype=torch.float64)
        for client, up in federation.ups.items():
            share = sizes[client] / sum(sizes.values())
            product = up.weights[place.right].double() @ up.weights[place.left].double()
            total = total + share * place.scale * product
        found[layer] = total
    return found


def effective(method: Method, state: Any, net: Net) -> dict[str, Tensor]:
    """What each adapted layer computes with under a state: W + s B A, float64."""
    method.materialise(state, net)
    return computes(net)


def computes(net: Net) -> dict[str, Tensor]:
    """The same of what is in the net."""
    with torch.no_grad():
        return {
            layer: net.model.get_parameter(place.weight).double()
            + place.scale
            * (net.model.get_parameter(place.right).double() @ net.model.get_parameter(place.left).double())
            for layer, place in net.adapted().items()
        }


def weights(method: Method, state: Any, net: Net) -> dict[str, Tensor]:
    """The weights below the factors under a state, float64."""
    method.materialise(state, net)
    return {n: net.model.get_parameter(p.weight).detach().double().clone() for n, p in net.adapted().items()}


def apart(one: dict[str, Tensor], two: dict[str, Tensor], unit: dict[str, Tensor]) -> float:
    """The largest distance of two layers, as a part of the length of `unit`."""
    return max(float((one[name] - two[name]).norm() / unit[name].norm()) for name in one)
