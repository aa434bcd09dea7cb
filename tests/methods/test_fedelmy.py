"""FedELMY against its loss, written out with the whole pool in memory, and against the plain relay."""

from __future__ import annotations

import copy
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import lora_net
from federation import Federation, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedelmy import FedELMY, scale
from thinwire.model.net import Net
from thinwire.train.objective import loss
from thinwire.train.weights import Trained

SGD: dict[str, Any] = {"lr": 0.05, "steps": 3, "batch_size": 4, "optimiser": "sgd", "clip": 0.0}
TERMS: dict[str, Any] = {"pool": 3, "alpha": 0.3, "beta": 0.7}
PLAIN: dict[str, Any] = {"pool": 1, "alpha": 0.0, "beta": 0.0}
Weights = list[Tensor]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def mean(models: list[Weights]) -> Weights:
    return [torch.stack(tensors).mean(0) for tensors in zip(*models, strict=True)]


def distance(one: Weights, other: Weights) -> Tensor:
    return sum(((a - b).square().sum() for a, b in zip(one, other, strict=True)), torch.zeros(()))


def order(x: float) -> int:
    return math.floor(math.log10(x))


def visit(method: FedELMY, federation: Federation, id: int, came: Weights, divisors: list[float]) -> Weights:
    """A client's visit as the paper and its code have it: all models of the pool, and autograd of the whole loss."""
    client, pool = federation.client(id, id + 1), [came] if method.received else []
    for turn in range(method.pool):
        model = copy.deepcopy(federation.net.model).double()
        parameters = [dict(model.named_parameters())[name] for name in federation.net.names]
        start = mean(pool) if pool else came
        with torch.no_grad():
            for parameter, tensor in zip(parameters, start, strict=True):
                parameter.copy_(tensor)
        others = [*pool, start]  # the published code counts the start itself too
        key = client.key.fold("pool", turn) if turn else client.key
        for batch in islice(client.data.batches(key.fold("batches"), method.batch_size), method.steps):
            entropy = loss(model, batch)
            d1 = sum((distance(parameters, other) for other in others), torch.zeros(())) / len(others)  # type: ignore[arg-type]
            d2 = distance(parameters, came)  # type: ignore[arg-type]
            a = 1.0
            if d2.item() > 0 and order(d2.item()) > order(entropy.item()) - 1:
                a = 10.0 ** (order(d2.item()) - order(entropy.item()) + 1)
            divisors.append(a)
            gradients = torch.autograd.grad(entropy - method.alpha / a * d1 + method.beta / a * d2, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= method.lr * gradient
        pool.append([p.detach().clone() for p in parameters])
    return mean(pool)


@pytest.mark.parametrize("received", [True, False])
@pytest.mark.parametrize("kind", ["all weights", "factors"])
def test_a_pass_is_the_published_loss_on_the_whole_pool(received: bool, kind: str, tmp_path: Path) -> None:
    net = tiny_net(tmp_path / "model") if kind == "all weights" else lora_net(tmp_path / "model")
    # on all weights 0.05 is a rate at which steps grow: rounding grows with them, by as much as the processor likes
    method = FedELMY(**SGD | {"lr": 0.02 if kind == "all weights" else 0.5}, **TERMS, received=received)
    federation = Federation(method, net, tmp_path / "run", rounds=3)
    net.reset()
    passed, divisors = [net.base[name].double() for name in net.names], list[float]()
    for id in range(3):
        passed = visit(method, federation, id, passed, divisors)
        federation.step(cohort=(id,))
    start = [net.base[name].double() for name in net.names]
    found = [federation.state.weights[name].double() for name in net.names]
    assert distance(found, passed) < 1e-9 * distance(passed, start)
    assert len(divisors) == 27
    if kind == "all weights":
        assert min(divisors) == 1 < max(divisors)  # both sides of the rule have been at work


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "factors"])
def test_a_pool_of_one_without_the_terms_is_the_plain_relay_bit_for_bit(kind: str, tmp_path: Path) -> None:
    net = lora_net(tmp_path / "model") if kind == "factors" else tiny_net(tmp_path / "model", kind)
    local = {"lr": 1e-2, "steps": 3, "batch_size": 4, "schedule": "linear"}
    mine = Federation(FedELMY(**local, **PLAIN, received=False), net, tmp_path / "a", rounds=3)
    theirs = Federation(FedAvg(**local), net, tmp_path / "b", rounds=3)
    for id in range(3):
        mine.step(cohort=(id,))
        theirs.step(cohort=(id,))
    one, other = (bytes(wire.encode(Trained(run.state.weights, 0, 0.0, 0))) for run in (mine, theirs))
    assert one == other
    assert [at.ledger.bytes_up for at in mine.history] == [at.ledger.bytes_up for at in theirs.history]
    for change in ({"alpha": 0.5}, {"beta": 0.5}, {"pool": 2}, {"received": True}):
        fields = {**local, **PLAIN, "received": False, **change}
        assert Federation(FedELMY(**fields), net, tmp_path / str(change), rounds=3).step((0,)).visits[0].error is None


def test_the_model_that_came_counts_as_one_of_the_pool(net: Net, tmp_path: Path) -> None:
    """As published: a pool of one then goes half the way of the plain relay."""
    half, whole = (
        Federation(FedELMY(**SGD, **PLAIN, received=received), net, tmp_path / str(received), rounds=1)
        for received in (True, False)
    )
    for federation in (half, whole):
        federation.step(cohort=(1,))
    for name, tensor in half.state.weights.items():
        torch.testing.assert_close(tensor, (net.base[name] + whole.state.weights[name]) / 2, rtol=0, atol=1e-7)


def test_each_term_does_what_it_is_for(net: Net, tmp_path: Path) -> None:
    """alpha drives what is sent away from what came, beta back to it."""

    def away(**terms: float) -> float:
        method = FedELMY(**(SGD | {"lr": 1e-2}), **(TERMS | {"alpha": 0.0, "beta": 0.0} | terms))
        federation = Federation(method, net, tmp_path / str(terms), rounds=1)
        federation.step(cohort=(0,))
        return sum(float((t - net.base[n]).square().sum()) for n, t in federation.state.weights.items())

    assert away(beta=20.0) < 0.9 * away() < away() < 0.9 * away(alpha=20.0)


@pytest.mark.parametrize(
    ("entropy", "squared", "divisor"),
    [
        (2.3, 0.0, 1.0),  # nothing has moved
        (2.3, 0.0999, 1.0),
        (2.3, 0.1, 1.0),
        (2.3, 0.99, 1.0),
        (2.3, 1.0, 10.0),
        (0.5, 0.2, 10.0),
        (0.05, 300.0, 1e5),
        (31.0, 7.0, 1.0),
        (0.0, 5.0, 1.0),
    ],
)
def test_the_divisor(entropy: float, squared: float, divisor: float) -> None:
    assert scale(entropy, squared) == pytest.approx(divisor)


def test_a_pass_costs_each_client_one_model_down_and_up(net: Net, tmp_path: Path) -> None:
    federation = Federation(FedELMY(**SGD, **TERMS), net, tmp_path, rounds=3)
    for id in range(3):
        at = federation.step(cohort=(id,))
        assert 0 < at.visits[id].bytes_down - net.nbytes < 6_000
        assert 0 < at.visits[id].bytes_up - net.nbytes < 6_000


def test_moments_that_would_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="fresh"):
        FedELMY.model_validate({"moments": "kept"})
