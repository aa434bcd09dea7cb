"""The local first-order loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import closed_data, tiny_net

from thinwire.keys import Key
from thinwire.train import local
from thinwire.train.local import Rule, train_locally


def test_recomputed_activations_give_the_same_weights_and_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, checkpoints = tiny_net(tmp_path), []
    real = local.checkpoint

    def counted(*args: object, **kwargs: object) -> object:
        checkpoints.append(args[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(local, "checkpoint", counted)
    data, found = closed_data(net, 16, 1), []
    for recompute in (False, True):
        net.reset()
        batches = data.batches(Key.root(1), 4)
        parameters = [p for _, p in net.parameters()]
        trained = train_locally(net.model, parameters, batches, Rule("adamw", 1e-2, 3), recompute=recompute)
        found.append((trained[:2], net.state_sha256()))
    assert found[0] == found[1]
    assert len(checkpoints) == 3 * net.model.config.num_hidden_layers
    assert not any("forward" in vars(module) for module in net.model.modules())


def test_what_is_not_asked_for_stays_and_has_no_gradient(tmp_path: Path) -> None:
    net = tiny_net(tmp_path)
    net.reset()
    start = {name: p.detach().clone() for name, p in net.parameters()}
    some = {name: p for name, p in net.parameters() if ".layers.1." in name}
    for name, p in net.parameters():
        p.requires_grad_(name in some)
    batches = closed_data(net, 16, 1).batches(Key.root(1), 4)
    train_locally(net.model, list(some.values()), batches, Rule("adamw", 1e-2, 2))
    for name, p in net.parameters():
        assert torch.equal(p, start[name]) != (name in some), name
        assert p.grad is None, name
