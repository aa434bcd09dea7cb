"""FedAvg against its equation, and what its server refuses."""

from __future__ import annotations

import copy
import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net

from thinwire import wire
from thinwire.methods.fedavg import FedAvg
from thinwire.model.net import Net
from thinwire.train.objective import loss
from thinwire.train.weights import Trained


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_round_is_the_weighted_mean_of_models_trained_apart(weighting: Any, net: Net, tmp_path: Path) -> None:
    """Two rounds against copies of the model, torch's own AdamW, and a mean in float64."""
    method = FedAvg(lr=1e-3, steps=3, batch_size=4, weight_decay=0.1, weighting=weighting, clip=0)
    federation = Federation(method, net, tmp_path, rounds=2)
    net.reset()
    mean = {name: p.detach().double().clone() for name, p in net.parameters()}
    for round in (1, 2):
        total, shares = {name: torch.zeros_like(t) for name, t in mean.items()}, 0
        for id, rows in enumerate(federation.sizes):
            model = copy.deepcopy(net.model)
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(mean[name])
            rule = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
            client = federation.client(id, round)
            for batch in islice(client.data.batches(client.key.fold("batches"), 4), 3):
                rule.zero_grad()
                loss(model, batch).backward()
                rule.step()
            share = rows if weighting == "examples" else 1
            shares += share
            for name, parameter in parameters.items():
                total[name] += share * parameter.detach().double()
        mean = {name: t / shares for name, t in total.items()}
        federation.step()
    # AdamW divides by |gradient|: where that is next to nothing, a rounding decides a whole step.
    for name, tensor in federation.state.weights.items():
        moved = mean[name] - net.base[name].double()
        assert (tensor.double() - mean[name]).norm() < 1e-2 * moved.norm(), name


def test_bf16_weights_are_trained_through_float32(tmp_path: Path) -> None:
    """Steps below half a unit in the last place of bf16 still add up within a client's round."""
    net = tiny_net(tmp_path, "bfloat16")
    federation = Federation(FedAvg(lr=1e-4, steps=40, batch_size=4, clip=0), net, tmp_path / "run", rounds=1)
    before = {name: t.clone() for name, t in federation.state.weights.items()}
    federation.run()
    weight = "model.layers.0.input_layernorm.weight"  # all ones: one bf16 step down is 0.0039
    assert (federation.state.weights[weight] != before[weight]).any()
    assert all(t.dtype == torch.bfloat16 for t in federation.state.weights.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: {**w, "extra": torch.ones(1)}, "names"),
        (lambda w: dict(list(w.items())[1:]), "names"),
        (lambda w: {n: t.double() for n, t in w.items()}, "float64"),
        (lambda w: {n: t.flatten() for n, t in w.items()}, "not torch.float32"),
        (lambda w: {n: torch.full_like(t, float("inf")) for n, t in w.items()}, "not finite"),
    ],
)
def test_what_a_client_may_not_answer(change: Any, reason: str, net: Net, tmp_path: Path) -> None:
    federation = Federation(FedAvg(), net, tmp_path)
    good = Trained(dict(federation.state.weights), 8, 0.5, 0)
    federation.method.check(federation.state, 0, good)
    with pytest.raises(wire.Illegal, match=reason):
        federation.method.check(federation.state, 0, dataclasses.replace(good, weights=change(good.weights)))


def test_a_nan_loss_skips_the_step(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.train import local

    calls = iter(range(100))
    real = local.batch_loss
    monkeypatch.setattr(local, "batch_loss", lambda *a: real(*a) * (float("nan") if next(calls) % 2 else 1.0))
    federation = Federation(FedAvg(lr=1e-3, steps=6, batch_size=4), net, tmp_path, sizes=(8,))
    federation.step()
    assert federation.metrics["skipped"] == 3
    assert all(torch.isfinite(t).all() for t in federation.state.weights.values())
