"""FedZO against FedKSeed: the same pool of directions makes the same weights, for bytes as many as FedAvg's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net

from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedzo import FedZO
from thinwire.model.net import Net

SAME: dict[str, Any] = {"seeds": 32, "steps": 6, "batch_size": 4, "lr": 1e-4, "eps": 1e-3, "law": "gaussian"}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def weights_of(federation: Federation) -> torch.Tensor:
    federation.net.forget()
    federation.method.materialise(federation.state, federation.net)
    return torch.cat([p.detach().flatten().clone() for _, p in federation.net.parameters()])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"queries": 2, "weighting": "uniform", "schedule": "linear"},
        {"law": "sign", "weight_decay": 0.1},
        {"law": "lowrank", "rank": 2},
    ],
    ids=["plain", "queries", "sign", "lowrank"],
)
def test_fedkseeds_pool_makes_fedkseeds_weights(net: Net, tmp_path: Path, more: dict[str, Any]) -> None:
    zo = Federation(FedZO(**(SAME | more)), net, tmp_path / "zo", rounds=3).run()
    seeds = Federation(FedKSeed(**(SAME | more), wire="paper"), net, tmp_path / "seeds", rounds=3).run()
    net.reset()
    start = torch.cat([p.detach().flatten().clone() for _, p in net.parameters()])
    moved = weights_of(zo) - start
    assert moved.norm() > 1e-2
    # Not to the bit: a mean of weights rounds otherwise than a sum over the pool, and the next losses differ by that.
    assert (weights_of(seeds) - start - moved).norm() < 1e-3 * moved.norm()


def test_without_a_pool_directions_do_not_come_again(net: Net, tmp_path: Path) -> None:
    fresh = Federation(FedZO(**(SAME | {"seeds": 1 << 32})), net, tmp_path / "fresh", rounds=1).run()
    again = Federation(FedZO(**SAME), net, tmp_path / "pool", rounds=1).run()
    assert not torch.equal(weights_of(fresh), weights_of(again))
