"""SCAFFOLD against its equations, on the tiny model and on quadratics whose optimum is known."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net
from torch import Tensor, nn

from thinwire import wire
from thinwire.aggregate.server_step import Momentum
from thinwire.core import Averaged, Client, Server
from thinwire.keys import Key
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.scaffold import CONTROL, Corrected, Scaffold
from thinwire.model.net import Net
from thinwire.runtime.endpoint import ACTIONS, Endpoint
from thinwire.train import local as training
from thinwire.train.weights import Trained

SGD: dict[str, Any] = {"lr": 0.3, "batch_size": 4, "clip": 0.0, "optimiser": "sgd", "weighting": "uniform"}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


class Quadratic(nn.Module):
    """One parameter, w; a batch of client i is (h_i, target_i), its loss h_i / 2 |w - target_i|^2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))


VERSIONS: Any = None  # of which the method keeps none
HEIGHTS, TARGETS = (1.0, 4.0), (torch.tensor([1.0, 0.0, -2.0]), torch.tensor([-1.0, 3.0, 0.5]))
BEST = (HEIGHTS[0] * TARGETS[0] + HEIGHTS[1] * TARGETS[1]) / sum(HEIGHTS)  # where the mean of both losses is least


class Toy:
    """Two clients of quadratics under a method's own hooks."""

    def __init__(self, method: Averaged, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Quadratic()
        self.net: Any = SimpleNamespace(
            model=model,
            names=("w",),
            base={"w": torch.zeros(3)},
            parameters=lambda: iter([("w", model.w)]),
            trained=lambda: iter([("w", model.w)]),
            parameter=lambda name: model.w,
            rebuild=lambda token, build: build(),
        )
        monkeypatch.setattr(training, "batch_loss", lambda model, b: b[0] / 2 * (model.w - b[1]).square().sum())
        monkeypatch.setattr(training.parallel, "part", lambda batch, always: (batch, 1.0))
        self.method, self.memories = method, [dict[str, Tensor](), dict[str, Tensor]()]
        self.state: Any = method.init(self.server(0))

    def server(self, round: int) -> Server:
        return Server(self.net, Key.root(0), round, 99, (0, 1), VERSIONS, clients=2)

    def reply(self, id: int, round: int) -> Any:
        down = self.method.broadcast(self.state, self.server(round), id, None)
        batches = itertools.repeat((HEIGHTS[id], TARGETS[id]))
        data: Any = type("Rows", (), {"batches": lambda self, key, size: batches, "__len__": lambda self: 5})()
        client = Client(id, self.net, data, Key.root(round), self.memories[id], VERSIONS)
        up = self.method.client_update(down, client)
        return wire.decode(self.method.Up, wire.encode(up))  # a copy: the net is the next client's too

    def run(self, rounds: int) -> Tensor:
        for round in range(1, rounds + 1):
            ups = [(id, self.reply(id, round)) for id in (0, 1)]
            self.state, _ = self.method.aggregate(self.state, self.server(round), iter(ups))
        found: Tensor = self.state.weights["w"]
        return found


def test_drift_vanishes_where_fedavgs_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**SGD, "lr": 0.1, "steps": 10}
    mine = Toy(Scaffold(**fields), monkeypatch)
    torch.testing.assert_close(mine.run(80), BEST, rtol=0, atol=1e-4)
    theirs = Toy(FedAvg(**fields), monkeypatch).run(80)
    # FedAvg ends where the clients' ten steps cancel out, not where their gradients do
    shares = [1 - (1 - 0.1 * h) ** 10 for h in HEIGHTS]
    torch.testing.assert_close(
        theirs, (shares[0] * TARGETS[0] + shares[1] * TARGETS[1]) / sum(shares), rtol=0, atol=1e-4
    )
    assert float((theirs - BEST).norm()) > 0.3
    # and at the end each c_i is its client's gradient there, and c their mean, 0
    for height, target, memory in zip(HEIGHTS, TARGETS, mine.memories, strict=True):
        torch.testing.assert_close(memory[CONTROL + "w"], height * (BEST - target), rtol=0, atol=1e-3)
    assert float(mine.state.controls["w"].norm()) < 1e-3


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_visit_is_the_papers_with_option_two(warmup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds of both clients in float64, step by step."""
    toy = Toy(Scaffold(**{**SGD, "lr": 0.1, "steps": 5}, warmup=warmup), monkeypatch)
    w, c = torch.zeros(3).double(), torch.zeros(3).double()
    own = [torch.zeros(3).double() for _ in range(2)]
    for round in (1, 2, 3):
        ys, changes = [], []
        for i in (0, 1):
            y, total = w.clone(), 0.0
            for step in range(5):
                rate = 0.1 * min(1.0, (step + 1) / (warmup + 1))
                y -= rate * (HEIGHTS[i] * (y - TARGETS[i]) + c - own[i])
                total += rate
            changes.append(-c + (w - y) / total)
            ys.append(y)
            own[i] = own[i] + changes[i]
        w, c = (ys[0] + ys[1]) / 2, c + (changes[0] + changes[1]) / 2
        toy_w = toy.run(1) if round == 1 else _one_more(toy, round)
        torch.testing.assert_close(toy_w.double(), w, rtol=0, atol=1e-5)
        torch.testing.assert_close(toy.state.controls["w"].double(), c, rtol=0, atol=1e-4)


def _one_more(toy: Toy, round: int) -> Tensor:
    ups = [(id, toy.reply(id, round)) for id in (0, 1)]
    toy.state, _ = toy.method.aggregate(toy.state, toy.server(round), iter(ups))
    found: Tensor = toy.state.weights["w"]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_control_variates_a_step_is_fedavgs_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    net = tiny_net(tmp_path / "model", dtype)
    step = {"server_step": Momentum()}
    mine = Federation(Scaffold(**SGD, **step, steps=1), net, tmp_path / "a", rounds=1).run()
    theirs = Federation(FedAvg(**SGD, **step, steps=1), net, tmp_path / "b", rounds=1).run()
    one, other = (bytes(wire.encode(Trained(run.state.weights, 0, 0.0, 0))) for run in (mine, theirs))
    assert one == other
    # one step of gradient g from c = 0: each c_i is g_i, and the next round's steps are not FedAvg's any more
    assert all(float(c.abs().max()) > 0 for c in mine.state.controls.values())
    one = Federation(Scaffold(**SGD, steps=1), net, tmp_path / "c", rounds=2).run()
    two = Federation(FedAvg(**SGD, steps=1), net, tmp_path / "d", rounds=2).run()
    assert any(not torch.equal(one.state.weights[n], t) for n, t in two.state.weights.items())


def test_bytes_are_twice_fedavgs(net: Net, tmp_path: Path) -> None:
    mine = Federation(Scaffold(**SGD, steps=1), net, tmp_path / "a", rounds=1).step().visits[0]
    theirs = Federation(FedAvg(**SGD, steps=1), net, tmp_path / "b", rounds=1).step().visits[0]
    assert mine.bytes_down == pytest.approx(2 * theirs.bytes_down, rel=0.01)
    assert mine.bytes_up == pytest.approx(2 * theirs.bytes_up, rel=0.01)


def test_c_moves_by_the_share_of_the_clients_that_were_there(net: Net, tmp_path: Path) -> None:
    federation = Federation(Scaffold(**SGD, steps=2), net, tmp_path, rounds=1)
    federation.step(cohort=(1,))
    own = federation.memories.of(1, 2)
    for name, control in federation.state.controls.items():
        torch.testing.assert_close(control, own[CONTROL + name] / 3, rtol=1e-6, atol=0)


def test_a_client_that_is_asked_twice_moves_its_control_variate_once(net: Net, tmp_path: Path) -> None:
    method = Scaffold(**SGD, steps=2)
    federation = Federation(method, net, tmp_path, rounds=2).run(1)
    down = method.broadcast(federation.state, federation.server(2, (0, 1, 2)), 1, None)
    frame = wire.encode(down, run=1, round=2, client=1)
    endpoint = Endpoint(method, federation.seats, ACTIONS)
    first = endpoint.answer("train", frame)
    kept = {name: tensor.clone() for name, tensor in federation.memories.of(1, 3).items()}
    assert bytes(endpoint.answer("train", frame)) == bytes(first)
    after = federation.memories.of(1, 3)
    assert set(after) == set(kept)
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: dict(list(c.items())[1:]), "names of the control variates"),
        (lambda c: {n: t.double() for n, t in c.items()}, "float64"),
        (lambda c: {n: t.flatten() for n, t in c.items()}, "is torch.float32"),
        (lambda c: {n: torch.full_like(t, float("nan")) for n, t in c.items()}, "not finite"),
        (lambda c: {n: torch.full_like(t, 1e5) for n, t in c.items()}, "beyond 60000"),
    ],
)
def test_what_a_client_may_not_answer(change: Any, reason: str, net: Net, tmp_path: Path) -> None:
    federation = Federation(Scaffold(), net, tmp_path)
    weights = dict(federation.state.weights)
    good = Corrected(weights, {n: torch.zeros_like(t) for n, t in weights.items()}, 8, 0.5, 0)
    federation.method.check(federation.state, 0, good)
    with pytest.raises(wire.Illegal, match=reason):
        federation.method.check(federation.state, 0, dataclasses.replace(good, controls=change(dict(good.controls))))


def test_another_optimiser_is_refused() -> None:
    with pytest.raises(ValueError, match="sgd"):
        Scaffold.model_validate({"optimiser": "adamw"})
