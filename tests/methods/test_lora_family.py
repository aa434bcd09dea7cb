"""The LoRA family side by side: with one client no aggregation changes what it has learnt, and all learn the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from factored import apart, computes, effective, lora_net, watched
from torch import Tensor

from thinwire.core import Method
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedex import FedEx
from thinwire.methods.flexlora import FlexLora
from thinwire.methods.flora import FLora
from thinwire.methods.hetlora import HetLora
from thinwire.methods.rolora import RoLora
from thinwire.methods.slora import SLora
from thinwire.model.net import Net
from thinwire.wire import Frame

LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 4, "batch_size": 4}
METHODS: dict[str, Method] = {
    "fedit": FedAvg(**LOCAL),
    "ffa": FedAvg(**LOCAL),
    "rolora": RoLora(**LOCAL),
    "fedex": FedEx(**LOCAL),
    "flora": FLora(**LOCAL),
    "flexlora": FlexLora(**LOCAL),
    "hetlora": HetLora(**LOCAL),
    "slora": SLora(**LOCAL, first=0.1),  # its second stage
    "slora's first stage": SLora(**LOCAL, first=0.9),
}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Net]:
    folder = tmp_path_factory.mktemp("model")
    return {"both": lora_net(folder), "B": lora_net(folder, freeze_a=True)}


def start(net: Net) -> dict[str, Tensor]:
    return {name: net.base[place.weight].double() for name, place in net.adapted().items()}


@pytest.mark.parametrize("name", METHODS)
def test_of_one_client_the_server_has_what_it_has_learnt(name: str, nets: dict[str, Net], tmp_path: Path) -> None:
    net, method, ends = nets["B" if name == "ffa" else "both"], METHODS[name], list[dict[str, Tensor]]()
    net.reset()

    def seen(client: int, frame: Frame) -> Frame:
        ends.append(computes(net))
        return frame

    federation = watched(method, net, tmp_path, sizes=(12,), tamper=seen)
    for round in (1, 2):
        federation.step()
        moved = {layer: end - start(net)[layer] for layer, end in ends[-1].items()}
        assert all(float(change.norm()) > 0 for change in moved.values())
        assert apart(effective(method, federation.state, net), ends[-1], moved) < 1e-6, round


@pytest.mark.parametrize(("name", "rounds"), [("fedex", 2), ("flexlora", 1), ("hetlora", 2), ("slora", 2)])
def test_with_one_client_it_is_fedit(name: str, rounds: int, nets: dict[str, Net], tmp_path: Path) -> None:
    """Where both begin from the same factors: FlexLoRA in the first round alone, FLoRA never."""
    net, ends = nets["both"], {}
    other = HetLora(**LOCAL, penalty=0.0) if name == "hetlora" else METHODS[name]
    for method in (METHODS["fedit"], other):
        net.reset()
        federation = watched(method, net, tmp_path / str(len(ends)), sizes=(12,)).run(rounds)
        ends[len(ends)] = effective(method, federation.state, net)
    change = {layer: end - start(net)[layer] for layer, end in ends[0].items()}
    assert apart(ends[1], ends[0], change) < 1e-6
