"""Gradients of central differences: on a bilinear loss they are exact projections, and their cosine is the law's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from thinwire.keys import Key
from thinwire.train.differences import Differences, cosine


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 7), (66,))]


def slopes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for shape in ((5, 7), (66,))]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_one_probe_is_the_slope_along_its_direction() -> None:
    """Of a linear loss, exactly: g = (s z) z, whose entries are all as large."""
    held, s = parameters(), slopes()
    before = [p.detach().clone() for p in held]

    def loss() -> Tensor:
        return sum(((p.double() * w).sum() for p, w in zip(held, s, strict=True)), torch.zeros((), dtype=torch.float64))

    mean = Differences(1, 1e-2, Key.root(0)).find(held, 0, loss)
    assert float(mean) == pytest.approx(loss().item(), rel=1e-6)
    found = flat([p.grad for p in held if p.grad is not None])
    z = found.sign()
    assert found.abs().max() == found.abs().min()
    assert float(found[0] * z[0]) == pytest.approx(float(abs((flat(s) * z).sum())), rel=1e-3)
    assert all(torch.equal(p, b) for p, b in zip(held, before, strict=True))


def test_many_probes_have_the_cosine_of_the_law() -> None:
    held, s = parameters(), slopes()

    def loss() -> Tensor:
        return sum(((p.double() * w).sum() for p, w in zip(held, s, strict=True)), torch.zeros((), dtype=torch.float64))

    for count in (10, 100, 1000):
        found = []
        for seed in range(20):
            Differences(count, 1e-2, Key.root(seed)).find(held, 0, loss)
            gradient = flat([p.grad for p in held if p.grad is not None])
            found.append(float(torch.cosine_similarity(gradient, flat(s), dim=0)))
        assert sum(found) / 20 == pytest.approx(cosine(count, 101), abs=0.05)
    assert cosine(100, 101) == pytest.approx(math.sqrt(0.5))


def test_each_step_and_each_key_has_directions_of_its_own() -> None:
    held, found = parameters(), []
    for key, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        Differences(1, 1e-2, Key.root(key)).find(held, step, lambda: held[1].double().sum())
        found.append(flat([p.grad for p in held if p.grad is not None]).sign())
    assert torch.equal(found[0], found[1])
    for other in found[2:]:
        assert abs(float((found[0] * other).mean())) < 0.4


def test_parameters_of_bfloat16_end_as_they_were_and_a_loss_that_is_none_gives_no_gradient() -> None:
    held = parameters(torch.bfloat16)
    before = [p.detach().clone() for p in held]
    assert not math.isfinite(Differences(2, 1e-2, Key.root(0)).find(held, 0, lambda: torch.tensor(math.nan)))
    assert all(p.grad is None for p in held)
    Differences(2, 1e-2, Key.root(0)).find(held, 0, lambda: held[1].double().sum())
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in held)
    assert all(torch.equal(p, b) for p, b in zip(held, before, strict=True))
