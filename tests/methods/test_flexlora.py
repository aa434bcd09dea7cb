"""FlexLoRA: the exact mean of products, cut back to each client's rank; HetLoRA against a slow oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factored import apart, effective, lora_net, products, watched
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.flexlora import FlexLora
from thinwire.methods.hetlora import RANK, HetLora
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.wire import Illegal

LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return lora_net(tmp_path_factory.mktemp("model"))


def base(net: Net) -> dict[str, Tensor]:
    return {name: net.base[place.weight].double() for name, place in net.adapted().items()}


def test_before_truncation_it_is_the_exact_mean(tmp_path: Path) -> None:
    """Two clients of rank 4 under a view of rank 8: nothing is cut."""
    net = lora_net(tmp_path / "model", rank=8)
    federation = watched(FlexLora(**LOCAL, ranks={0: 4, 1: 4}), net, tmp_path, sizes=(12, 8))
    for _ in range(3):
        federation.step()
        change, start = products(federation), base(net)
        exact = {layer: start[layer] + change[layer] for layer in change}
        assert apart(effective(federation.method, federation.state, net), exact, change) < 1e-6
        assert federation.metrics["lost"] == pytest.approx(0, abs=1e-9)


def test_cut_it_is_the_best_of_its_rank(net: Net, tmp_path: Path) -> None:
    federation = watched(FlexLora(**LOCAL, ranks={1: 2}), net, tmp_path).run(2)
    change, start = products(federation), base(net)
    best, lost, whole = {}, 0.0, 0.0
    for layer, matrix in change.items():
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        best[layer] = start[layer] + u[:, :4] @ torch.diag(values[:4]) @ v[:4]
        lost, whole = lost + float(values[4:].square().sum()), whole + float(values.square().sum())
    assert apart(effective(federation.method, federation.state, net), best, change) < 1e-6
    assert federation.metrics["lost"] > 1e-6
    exact = {layer: start[layer] + change[layer] for layer in change}
    assert apart(effective(federation.method, federation.state, net), exact, change) > 1e-4


def test_each_client_is_sent_and_sends_its_own_rank(net: Net, tmp_path: Path) -> None:
    method = FlexLora(**LOCAL, ranks={1: 2})
    federation = watched(method, net, tmp_path).run(2)
    for client, rank in ((0, 4), (1, 2), (2, 4)):
        down = method.broadcast(federation.state, federation.server(3, (0,)), client, None)
        for sent in (down.factors, federation.ups[client].weights):
            assert {t.shape[0] for n, t in sent.items() if ".lora_A." in n} == {rank}
            assert {t.shape[1] for n, t in sent.items() if ".lora_B." in n} == {rank}


def test_what_a_lower_rank_does_not_hold_no_step_moves(net: Net, tmp_path: Path) -> None:
    method = FlexLora(**LOCAL, weight_decay=0.1, ranks={1: 2})
    federation = watched(method, net, tmp_path)
    client = federation.client(1, 1)
    method.client_update(method.broadcast(federation.state, federation.server(1, (1,)), 1, None), client)
    for place in net.adapted().values():
        assert not net.parameter(place.left)[2:].any()
        assert not net.parameter(place.right)[:, 2:].any()
        assert net.parameter(place.right)[:, :2].any()


@pytest.mark.parametrize("method", [FlexLora(ranks={7: 2}), HetLora(ranks={7: 2})])
def test_ranks_of_unknown_clients_and_beyond_the_view_are_refused(method: Any, net: Net) -> None:
    with pytest.raises(ConfigError, match=r"^method\.ranks: no client 7: there are 3 clients, 0 to 2$"):
        method.check_clients(3)
    method.check_clients(8)
    with pytest.raises(ModelError, match=r"^method\.ranks\.7: 5 is more than model\.lora\.rank, which is 4$"):
        method.model_copy(update={"ranks": {7: 5}}).fits(net)


def test_a_reply_of_another_rank_is_refused(net: Net, tmp_path: Path) -> None:
    method = FlexLora(**LOCAL, ranks={1: 2})
    federation = watched(method, net, tmp_path).run(1)
    method.check(federation.state, 1, federation.ups[1])
    with pytest.raises(Illegal):
        method.check(federation.state, 1, federation.ups[0])
    with pytest.raises(Illegal):
        method.check(federation.state, 0, federation.ups[1])


def slow(replies: dict[int, dict[str, Tensor]], layers: dict[str, Any], rank: int) -> dict[str, Tensor]:
    """HetLoRA's mean, from its equation: a loop over clients, rows and layers."""
    found: dict[str, Tensor] = {}
    for place in layers.values():
        sizes = {c: torch.linalg.svdvals((w[place.right] @ w[place.left]).double()).norm() for c, w in replies.items()}
        left = torch.zeros(rank, replies[0][place.left].shape[1], dtype=torch.float64)
        right = torch.zeros(replies[0][place.right].shape[0], rank, dtype=torch.float64)
        for client, weights in replies.items():
            part = sizes[client] / sum(sizes.values())
            for row in range(weights[place.left].shape[0]):
                left[row] += part * weights[place.left][row]
                right[:, row] += part * weights[place.right][:, row]
        found |= {place.left: left, place.right: right}
    return found


def test_hetlora_s_mean_is_its_equation(net: Net, tmp_path: Path) -> None:
    federation = watched(HetLora(**LOCAL, ranks={1: 2, 2: 3}), net, tmp_path).run(3)
    wanted = slow({c: dict(up.weights) for c, up in federation.ups.items()}, net.adapted(), 4)
    for name, tensor in federation.state.factors.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-7)
    plain = FedAvg(**LOCAL)
    other = watched(plain, net, tmp_path / "plain").run(3)
    assert any(not torch.allclose(other.state.weights[n], t) for n, t in federation.state.factors.items())


def test_a_rank_falls_where_its_tail_has_shrunk_and_not_else(net: Net, tmp_path: Path) -> None:
    """A heavy penalty shrinks the tail once it is there; without one it grows, and nothing is cut."""
    heavy = HetLora(**LOCAL, keep=0.5, penalty=1e3, clip=0.0)
    federation = watched(heavy, net, tmp_path / "heavy", rounds=6)
    seen = []
    for round in range(1, 5):
        before = {c: heavy._now(federation.state, c) for c in range(3)}
        federation.step()
        for client, up in federation.ups.items():
            rank = next(t.shape[0] for n, t in up.weights.items() if ".lora_A." in n)
            assert rank in (before[client], max(1, before[client] // 2))
            assert int(federation.memories.of(client, round + 1)[RANK]) == rank
            seen.append(rank)
    assert seen[:3] == [4, 4, 4]  # B began at 0: its tail has only grown
    assert min(seen) < 4
    light = watched(HetLora(**LOCAL, keep=0.5, penalty=0.0), net, tmp_path / "light").run(2)
    assert light.metrics["rank"] == 4


def test_the_penalty_is_the_gradient_of_its_formula(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.train import local

    method = HetLora(lr=1.0, steps=1, batch_size=4, optimiser="sgd", clip=0.0, penalty=0.5, keep=0.5)
    draw = torch.Generator().manual_seed(0)
    start = {n: torch.randn(t.shape, generator=draw) * 0.1 for n, t in net.base.items()}
    monkeypatch.setattr(local, "batch_loss", lambda model, batch: 0.0 * sum(p.sum() for _, p in net.parameters()))
    federation = watched(method, net, tmp_path, sizes=(8,))
    down = type(federation.state)(start, [], [], 1.0)
    method.client_update(down, federation.client(0, 1))
    for place in net.adapted().values():
        left, right = (start[name].clone().requires_grad_() for name in (place.left, place.right))
        (0.5 * right[:, 2:].norm() * left[2:].norm()).backward()
        torch.testing.assert_close(net.parameter(place.left).detach(), start[place.left] - left.grad)
        torch.testing.assert_close(net.parameter(place.right).detach(), start[place.right] - right.grad)
