"""FedProx against its equation, written slowly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import Federation, closed_data, tiny_net

from thinwire.keys import Key
from thinwire.methods.fedavg import FedAvg
from thinwire.train.objective import loss


def test_fedprox_is_its_equation(tmp_path: Path) -> None:
    """w <- w - lr (grad F(w) + mu (w - w0)), by plain gradient descent."""
    net, mu, lr = tiny_net(tmp_path / "model"), 5.0, 0.05
    net.reset()
    data = closed_data(net, 12, 3)
    start = {name: p.detach().clone() for name, p in net.parameters()}
    batches = data.batches(Key.root(4).fold("batches"), 4)
    for _ in range(3):
        loss(net.model, next(batches)).backward()
        with torch.no_grad():
            for name, p in net.parameters():
                p -= lr * (p.grad + mu * (p - start[name]))
                p.grad = None
    expected = {name: p.detach().clone() for name, p in net.parameters()}
    net.reset()
    method = FedAvg(lr=lr, steps=3, batch_size=4, optimiser="sgd", clip=0.0, proximal=mu)
    client = Federation(method, net, tmp_path / "run").client(0, 1)
    client.data, client.key = data, Key.root(4)
    net.reset()
    assert method.train(client, lr).skipped == 0
    for name, p in net.parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_it_holds_clients_back(tmp_path: Path) -> None:
    net = tiny_net(tmp_path / "model")

    def distance(mu: float) -> float:
        method = FedAvg(lr=1e-2, steps=6, batch_size=4, proximal=mu)
        federation = Federation(method, net, tmp_path / str(mu), rounds=1).run()
        return sum(float((w - net.base[name]).norm()) for name, w in federation.state.weights.items())

    assert distance(100.0) < 0.9 * distance(0.0)
    with pytest.raises(ValueError, match="proximal"):
        FedAvg(proximal=-1.0)
