"""Stochastic rounding: one of the two neighbours, the value itself in the mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from thinwire.compress.exact.rounding import moves, stochastic
from thinwire.streams import words

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_each_value_goes_to_a_neighbour_and_the_mean_is_the_value(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, -0.1, 1.0001, -3.3333, 1e-6, -2e-7, 700.3, 3e-8])
    rounded = torch.stack([stochastic(x, dtype, key, 3).double() for key in range(4000)])
    values = [rounded[:, i].unique() for i in range(len(x))]
    for i, found in enumerate(values):
        low, high = found[0], found[-1]
        assert len(found) == 2
        assert low < x[i] < high
        # no value of the dtype lies between: the middle goes to one of the two
        assert float(((low + high) / 2).to(dtype)) in (float(low), float(high))
        # five standard errors of a mean of 4,000 draws, and the draws' own grain
        assert abs(rounded[:, i].mean() - x[i].double()) < (high - low) * (5 * 0.5 / np.sqrt(4000) + 2**-16)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_dtype_holds_stays(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -0.5, 2.0**-14, 60000.0]).to(dtype)
    for key in range(50):
        assert torch.equal(stochastic(x.float(), dtype, key, 0).view(torch.int16), x.view(torch.int16))


def slow(x: torch.Tensor, dtype: torch.dtype, key: int, stream: int) -> torch.Tensor:
    """The other neighbour where the draw is below the share of the way to it."""
    near = x.to(dtype)
    gap, pattern = x - near.float(), near.view(torch.int16)
    other = torch.where((gap > 0) == (x > 0), pattern + 1, pattern - 1).view(dtype)
    draws = torch.from_numpy(words(key, [stream], (x.numel() + 3) // 4).view("<u2")[0, : x.numel()].copy()).float()
    return torch.where((draws + 0.5) / 65536 < gap / (other.float() - near.float()), other, near)


@pytest.mark.parametrize("dtype", HALVES)
def test_it_is_the_slow_one_to_the_bit(dtype: torch.dtype) -> None:
    """Numbers of every exponent, zeros, denormal ones, and what is beyond the range."""
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38, 65519.0, 65520.0, math.inf, -math.inf])
    x = torch.cat([patterns.int().view(torch.float32), edges])
    x = x[~x.isnan()]
    for key in range(3):
        found, expected = stochastic(x, dtype, key, 7), slow(x, dtype, key, 7)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert stochastic(torch.tensor([math.nan]), dtype, 0, 0).isnan().all()


def test_signs_and_sizes_do_not_matter() -> None:
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert torch.equal(stochastic(x, torch.bfloat16, 5, 1), -stochastic(-x, torch.bfloat16, 5, 1))
    error = (stochastic(x, torch.bfloat16, 5, 1).float() - x) / x.abs()
    assert error.abs().max() < 2**-7
    assert abs(error.mean()) < 1e-4
    assert torch.equal(stochastic(x, torch.float32, 5, 1), x)


def test_draws_are_the_keys_and_the_streams() -> None:
    x = torch.full((1000,), 0.1)
    one = stochastic(x, torch.bfloat16, 5, 1)
    assert torch.equal(one, stochastic(x.reshape(10, 100), torch.bfloat16, 5, 1).reshape(-1))
    assert not torch.equal(one, stochastic(x, torch.bfloat16, 6, 1))
    assert not torch.equal(one, stochastic(x, torch.bfloat16, 5, 2))


def test_beyond_the_range_is_infinite() -> None:
    x = torch.tensor([1e6, -1e6])
    assert torch.equal(stochastic(x, torch.float16, 0, 0), x.half())


def test_a_change_below_half_a_step_moves_nothing() -> None:
    x = torch.tensor([1.0, 1.0, -1.0, 0.0]).bfloat16()
    assert moves(x, torch.tensor([1e-3, 1e-2, 1e-2, 1e-9])).tolist() == [False, True, True, True]
