"""RoLoRA and FFA-LoRA: with one factor the same for all, the mean of factors is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import lora_net, watched

from thinwire.core import StaleVersion
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.rolora import RoLora
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.wire import Illegal

LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def net(folder: Path) -> Net:
    return lora_net(folder)


def test_one_factor_moves_and_the_mean_is_exact(net: Net, tmp_path: Path) -> None:
    federation = watched(RoLora(**LOCAL), net, tmp_path)
    for still in "ABAB":
        before = federation.state.weights
        federation.step()
        after = federation.state.weights
        for place in net.adapted().values():
            moves, stays = (place.right, place.left) if still == "A" else (place.left, place.right)
            assert torch.equal(after[stays], before[stays])
            assert not torch.equal(after[moves], before[moves])
            exact = torch.zeros(1, dtype=torch.float64)
            for client, up in federation.ups.items():
                one = {**after, **up.weights}
                product = one[place.right].double() @ one[place.left].double()
                exact = exact + federation.sizes[client] / 36 * product
            found = after[place.right].double() @ after[place.left].double()
            assert (found - exact).norm() <= 1e-6 * exact.norm()
    assert all(p.grad is None for p in net.model.parameters())
    assert all(p.requires_grad == (name in net.names) for name, p in net.model.named_parameters())


def test_who_was_there_is_sent_the_half_that_moved(net: Net, tmp_path: Path) -> None:
    method = RoLora(**LOCAL)
    federation = watched(method, net, tmp_path)
    federation.step()
    federation.step((0, 2))
    server = federation.server(3, (0, 1, 3))
    seen = set()
    for client, half in ((0, True), (1, False)):
        down = method.broadcast(federation.state, server, client, federation.held.get(client))
        assert all(".lora_A." in name for name in down.weights) == half
        method.receive(down, federation.client(client, 3))
        seen.add(net.state_sha256())
    method.materialise(federation.state, net)
    assert seen == {net.state_sha256()}
    down = method.broadcast(federation.state, server, 0, federation.held[0])
    with pytest.raises(StaleVersion):
        method.receive(replace(down, base="f" * 32), federation.client(0, 3))
    for wrong in ({"turn": "C"}, {"version": "f" * 32}, {"weights": {n: t[1:] for n, t in down.weights.items()}}):
        with pytest.raises(Illegal):
            method.receive(replace(down, **wrong), federation.client(0, 3))
    other = method.broadcast(federation.state, server, 1, None).weights  # not the factor whose turn it is
    with pytest.raises(Illegal):
        method.check(federation.state, 0, replace(federation.ups[0], weights=other))


def test_a_net_without_both_factors_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.lora: missing; rolora"):
        RoLora().fits(lora_net(folder, freeze_a=True))


def test_ffa_trains_b_alone_and_is_exact(folder: Path, net: Net, tmp_path: Path) -> None:
    frozen = lora_net(folder, freeze_a=True)
    assert all(".lora_B." in name for name in frozen.names)
    federation = watched(FedAvg(**LOCAL), frozen, tmp_path).run(2)
    federation.method.materialise(federation.state, frozen)
    for place in frozen.adapted().values():
        left = frozen.model.get_parameter(place.left).detach()
        assert torch.equal(left, net.base[place.left])  # as the view with both draws it, from the same key
        parts = [federation.sizes[c] / 36 * up.weights[place.right].double() for c, up in federation.ups.items()]
        exact = torch.stack(parts).sum(0) @ left.double()
        found = federation.state.weights[place.right].double() @ left.double()
        assert (found - exact).norm() <= 1e-6 * exact.norm()


def test_with_equal_b_ffa_is_fedit(folder: Path, net: Net, tmp_path: Path) -> None:
    """Where all clients send the same B and A has not moved, both servers end at the same model."""
    frozen = lora_net(folder, freeze_a=True)
    ffa, fedit = (watched(FedAvg(**LOCAL), n, tmp_path / str(i)) for i, n in enumerate((frozen, net)))
    up = ffa.method.client_update(ffa.method.broadcast(ffa.state, ffa.server(1, ()), 0, None), ffa.client(0, 1))
    both = replace(up, weights={n: up.weights.get(n, net.base[n]) for n in net.names})
    one, _ = ffa.method.aggregate(ffa.state, ffa.server(1, (0, 1)), iter([(0, up), (1, up)]))
    two, _ = fedit.method.aggregate(fedit.state, fedit.server(1, (0, 1)), iter([(0, both), (1, both)]))
    for name in frozen.names:
        assert (one.weights[name] - two.weights[name]).abs().max() < 1e-6


def test_ffa_s_model_is_exported_whole(folder: Path, tmp_path: Path) -> None:
    frozen = lora_net(folder, freeze_a=True)
    frozen.reset()
    federation = watched(FedAvg(**LOCAL), frozen, tmp_path / "run").run(1)
    federation.method.materialise(federation.state, frozen)
    frozen.save(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = frozen.model(input_ids=ids).logits
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(input_ids=ids).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").exists()
