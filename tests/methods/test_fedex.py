"""FedEx-LoRA and FLoRA: the model after a round is the exact mean of the clients' models, at all who hold it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import apart, effective, lora_net, products, watched, weights

from thinwire.core import StaleVersion
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedex import FedEx
from thinwire.methods.flora import FLora
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.wire import Illegal

LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 4, "batch_size": 4}
METHODS = {"fedex": FedEx(**LOCAL), "flora": FLora(**LOCAL), "ranks": FLora(**LOCAL, ranks={0: 1, 2: 3})}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return lora_net(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("name", METHODS)
def test_a_round_is_the_exact_mean_of_products(name: str, weighting: str, net: Net, tmp_path: Path) -> None:
    method = METHODS[name].model_copy(update={"weighting": weighting})
    federation = watched(method, net, tmp_path)
    for _ in range(3):
        base = weights(method, federation.state, net)
        federation.step()
        change = products(federation, weighting == "examples")
        exact = {layer: base[layer] + change[layer] for layer in change}
        assert apart(effective(method, federation.state, net), exact, change) < 1e-6
    moved = weights(method, federation.state, net)
    assert all(not torch.equal(moved[name], base[name]) for name in base)


def test_the_mean_of_factors_is_another(net: Net, tmp_path: Path) -> None:
    """FedIT: what the others are exact in, it loses."""
    net.reset()
    method = FedAvg(**LOCAL)
    federation = watched(method, net, tmp_path)
    federation.run(2)
    base, change = weights(method, federation.state, net), products(federation)
    exact = {layer: base[layer] + change[layer] for layer in change}
    assert apart(effective(method, federation.state, net), exact, change) > 1e-2


@pytest.mark.parametrize("name", METHODS)
def test_who_returns_who_was_away_and_who_is_new_hold_the_same_bits(name: str, net: Net, tmp_path: Path) -> None:
    method = METHODS[name]
    federation = watched(method, net, tmp_path, rounds=9, sizes=(12, 8, 16, 8))
    federation.step((0, 1, 2))
    federation.step((0, 2))
    for last in range(3, 8):
        federation.step((0, 2))
        server = federation.server(last + 1, (0, 1, 3))
        seen = set()
        for client in (0, 1, 3):
            down = method.broadcast(federation.state, server, client, federation.held.get(client))
            try:
                method.receive(down, federation.client(client, last + 1))
            except StaleVersion:  # of versions this federation keeps three
                assert client == 1
                down = method.broadcast(federation.state, server, client, None)
                method.receive(down, federation.client(client, last + 1))
            seen.add(net.state_sha256())
        method.materialise(federation.state, net)
        assert seen == {net.state_sha256()}


def test_what_is_sent_is_never_longer_than_the_weights(net: Net, tmp_path: Path) -> None:
    method = METHODS["ranks"]
    federation = watched(method, net, tmp_path, rounds=9)
    ways = []
    for _ in range(7):
        down = method.broadcast(federation.state, federation.server(federation.round + 1, (0,)), 0, None)
        ways.append((down.rounds, len(down.weights)))
        dense = sum(t.nbytes for t in federation.state.weights.values())
        assert sum(t.nbytes for t in (*down.stacks.values(), *down.weights.values())) <= dense
        federation.step()
    assert ways[:3] == [(0, 0), (1, 0), (2, 0)]
    assert ways[-1] == (0, 6)


def test_a_version_that_is_not_held_is_stale_and_a_way_that_leads_elsewhere_is_refused(
    net: Net, tmp_path: Path
) -> None:
    method = METHODS["flora"]
    federation = watched(method, net, tmp_path).run(2)
    down = method.broadcast(federation.state, federation.server(3, (0,)), 0, federation.held[0])
    client = federation.client(0, 3)
    with pytest.raises(StaleVersion):
        method.receive(replace(down, base="f" * 32), client)
    assert down.stacks
    wrong = {
        "another product": {"stacks": {n: -t if n.endswith("left") else t for n, t in down.stacks.items()}},
        "cut": {"stacks": {n: t[1:] for n, t in down.stacks.items()}},
        "lacking": {"stacks": dict(list(down.stacks.items())[:-1])},
        "too many": {"rounds": 1 << 40},
        "negative": {"rounds": -1},
        "other names": {"weights": {"x": torch.zeros(1)}},
    }
    for change in wrong.values():
        with pytest.raises(Illegal):
            method.receive(replace(down, **change), client)


def test_low_precision_loses_only_the_rounding_of_the_base(tmp_path: Path) -> None:
    net = lora_net(tmp_path / "model", dtype="bfloat16")
    for method in (FedEx(**LOCAL), FLora(**LOCAL)):
        net.reset()
        federation = watched(method, net, tmp_path / method.name)
        base = weights(method, federation.state, net)
        federation.step()
        change = products(federation)
        found = effective(method, federation.state, net)
        for layer, exact in ((layer, base[layer] + change[layer]) for layer in change):
            assert (found[layer] - exact).abs().max() <= 2.0**-8 * 1.1 * (exact.abs().max() + change[layer].abs().max())


def test_a_rank_above_the_view_s_is_refused_before_anything_runs(net: Net) -> None:
    with pytest.raises(ModelError, match=r"^method\.ranks\.1: 5 is more than model\.lora\.rank, which is 4$"):
        FLora(ranks={1: 5}).fits(net)


def test_a_net_without_factors_is_refused(tmp_path: Path) -> None:
    from federation import tiny_net

    plain = tiny_net(tmp_path)
    frozen = lora_net(tmp_path, freeze_a=True)
    for method in (FedEx(), FLora()):
        with pytest.raises(ModelError, match=r"^model\.lora: missing; "):
            method.fits(plain)
        with pytest.raises(ModelError, match="one is not trained"):
            method.fits(frozen)


@pytest.mark.parametrize(
    "wrong", [{"server_step": "momentum"}, {"moments": "kept"}, {"server_step": {"kind": "plain", "lr": 0.5}}]
)
def test_what_does_not_go_with_products_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(server_step|moments): "):
        FedEx.model_validate(wrong)
