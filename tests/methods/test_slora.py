"""SLoRA: what the mask leaves keeps its bits, and the factors after it are the best of their rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import effective, lora_net, watched, weights

from thinwire.methods.fedavg import FedAvg
from thinwire.methods.slora import SLora
from thinwire.model.errors import ModelError
from thinwire.model.net import Net

LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return lora_net(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stage_one_leaves_the_unmasked_weights_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """At the client, under decay and momentum, and in the state; the masked ones move, and no factor has a gradient."""
    net = lora_net(tmp_path / "model", dtype=dtype)
    method = SLora(**LOCAL, weight_decay=0.1, proximal=0.1, density=0.05)
    federation = watched(method, net, tmp_path).run(1)
    state = federation.state
    client = federation.client(0, 2)
    for look in ("client", "state"):
        if look == "client":
            method.client_update(method.broadcast(state, federation.server(2, (0,)), 0, None), client)
        else:
            method.materialise(state, net)
        for place in net.adapted().values():
            weight, start = net.model.get_parameter(place.weight).detach(), net.base[place.weight]
            moved = (weight != start).flatten().nonzero().flatten()
            count = round(0.05 * start.numel())
            assert 0.5 * count <= moved.numel() <= count
            assert set(moved.tolist()) <= set(method._masks(net, state.key)[place.weight].tolist())
            assert torch.equal(net.parameter(place.right), net.base[place.right])
    assert all(p.grad is None for p in net.model.parameters())
    assert all(p.requires_grad == (name in net.names) for name, p in net.model.named_parameters())


def test_the_mean_of_the_masked_weights_is_fedavg_s(net: Net, tmp_path: Path) -> None:
    federation = watched(SLora(**LOCAL), net, tmp_path).run(1)
    for name, values in federation.state.values.items():
        parts = [federation.sizes[c] / 36 * up.weights[name].double() for c, up in federation.ups.items()]
        torch.testing.assert_close(values.double(), sum(parts, torch.zeros(1)), rtol=1e-6, atol=1e-7)


def test_the_switch_is_to_the_best_factors(net: Net, tmp_path: Path) -> None:
    """Against a dense SVD of the mean of the replies: Eckart and Young."""
    method = SLora(**LOCAL, density=0.2)
    federation = watched(method, net, tmp_path, rounds=4).run(2)  # the second is the last of stage 1
    masks = method._masks(net, federation.state.key)
    assert not federation.state.values
    found = effective(method, federation.state, net)
    for layer, place in net.adapted().items():
        start = net.base[place.weight]
        mean = sum(federation.sizes[c] / 36 * up.weights[place.weight].double() for c, up in federation.ups.items())
        change = torch.zeros(start.numel(), dtype=torch.float64)
        change[masks[place.weight]] = mean - start.flatten()[masks[place.weight]].double()
        u, values, v = torch.linalg.svd(change.view(start.shape), full_matrices=False)
        best = u[:, :4] @ torch.diag(values[:4]) @ v[:4]
        assert (found[layer] - start.double() - best).norm() < 1e-6 * best.norm()
        left = change.view(start.shape).sub(found[layer] - start.double()).norm()
        assert float(left) == pytest.approx(float(values[4:].norm()), rel=1e-5)
    for layer, weight in weights(method, federation.state, net).items():
        assert torch.equal(weight, net.base[net.adapted()[layer].weight].double())


def test_at_full_rank_nothing_is_lost(tmp_path: Path) -> None:
    net = lora_net(tmp_path / "model", rank=16)  # v_proj has 16 outputs
    method = SLora(**LOCAL)
    federation = watched(method, net, tmp_path, rounds=3).run(1)
    place = net.adapted()["model.layers.0.self_attn.v_proj"]
    mean = sum(federation.sizes[c] / 36 * up.weights[place.weight].double() for c, up in federation.ups.items())
    start = net.base[place.weight]
    flat = start.flatten().double()
    mask = method._masks(net, federation.state.key)[place.weight]
    change = mean - flat[mask]
    flat[mask] = mean
    found = effective(method, federation.state, net)["model.layers.0.self_attn.v_proj"]
    assert (found.flatten() - flat).norm() < 1e-6 * change.norm()


def test_stage_two_from_there_is_fedit(net: Net, tmp_path: Path) -> None:
    """Without a stage 1 it is FedAvg on factors, bit for bit."""
    ours = watched(SLora(**LOCAL, first=0.1), net, tmp_path / "ours").run(3)
    plain = watched(FedAvg(**LOCAL), net, tmp_path / "plain").run(3)
    assert all(torch.equal(ours.state.factors[name], plain.state.weights[name]) for name in net.names)


def test_an_empty_last_round_of_stage_one_prolongs_it(net: Net, tmp_path: Path) -> None:
    federation = watched(SLora(**LOCAL), net, tmp_path, rounds=4, tamper=lambda client, frame: None)
    federation.run(2)
    assert federation.state.values
    federation.tamper = None
    assert not federation.step().visits[0].error
    assert not federation.state.values


def test_a_mask_is_of_its_key_and_as_long_as_it_should_be(net: Net) -> None:
    method, place = SLora(), net.adapted()["model.layers.0.mlp.down_proj"]
    one, two, other = (method._masks(net, key)[place.weight] for key in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.numel() == net.base[place.left].numel() + net.base[place.right].numel()
    assert torch.equal(one, one.unique())
    share = len(set(one.tolist()) & set(other.tolist())) / one.numel()
    chance = one.numel() / net.base[place.weight].numel()
    assert abs(share - chance) < 5 * math.sqrt(chance / one.numel())


def test_without_a_lora_view_it_is_refused(tmp_path: Path) -> None:
    from federation import tiny_net

    with pytest.raises(ModelError, match=r"^model\.lora: missing; slora works with the factors of a LoRA view$"):
        SLora().fits(tiny_net(tmp_path))
