"""What the operating system draws has the laws that are asked for, never twice, and leaves all generators alone."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from thinwire.privacy.secrets import SystemSecrets

SECRETS = SystemSecrets()


def test_normal_numbers_are_normal() -> None:
    found = SECRETS.normal((200, 301), 2.0)
    assert (found.dtype, found.shape) == (torch.float64, (200, 301))
    assert bool(torch.isfinite(found).all())
    count = found.numel()
    # six deviations of each estimate: a failure in a thousand million runs
    assert abs(float(found.mean())) < 6 * 2 / math.sqrt(count)
    assert abs(float(found.var()) / 4 - 1) < 6 * math.sqrt(2 / count)
    for bound in (0.5, 1.0, 2.0, 3.0):
        within = math.erf(bound / math.sqrt(2))
        assert abs(float((found.abs() < 2 * bound).double().mean()) - within) < 6 * math.sqrt(
            within * (1 - within) / count
        )
    # neighbours, and the two numbers of a pair, have nothing to do with each other
    flat = found.flatten() / 2
    for apart in (1, count // 2):
        assert abs(float((flat[apart:] * flat[:-apart]).mean())) < 6 / math.sqrt(count - apart)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3), (7,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert SECRETS.normal(shape, 1.0).shape == shape
    assert not SECRETS.normal(shape, 0.0).any()


def test_sampling_is_poisson() -> None:
    draws = [SECRETS.sampled(1000, 0.3) for _ in range(200)]
    sizes = np.array([len(draw) for draw in draws])
    assert abs(sizes.mean() - 300) < 6 * math.sqrt(210 / 200)
    assert abs(sizes.var() / 210 - 1) < 6 * math.sqrt(
        2 / 200
    )  # sizes differ, as those of draws of a fixed number do not
    for draw in draws:
        assert draw.dtype == np.int64
        assert (np.diff(draw) > 0).all()
        assert ((draw >= 0) & (draw < 1000)).all()
    assert (SECRETS.sampled(9, 1.0) == np.arange(9)).all()
    assert len(SECRETS.sampled(9, 0.0)) == len(SECRETS.sampled(0, 0.5)) == 0
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"is not in \[0, 1\]"):
            SECRETS.sampled(9, rate)


def test_nothing_repeats_whatever_is_seeded() -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    torch_state = before[2].clone()
    found = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(SECRETS.normal((8,), 1.0))
    assert not torch.equal(*found)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)
