"""QSGD, held to its equations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress.codecs.qsgd import Qsgd


def gaussian(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_unbiased_over_keys_with_the_papers_variance() -> None:
    x, code = gaussian(256), Qsgd(1, bucket=64)
    draws = [code.decode(code.encode(x, key), x.shape, key) for key in range(400)]
    mean = sum(draws[1:], draws[0]) / len(draws)
    variance = sum(float((draw - x).square().sum()) for draw in draws) / len(draws) / float(x.square().sum())
    assert variance <= math.sqrt(64)
    assert float((mean - x).norm() / x.norm()) < 3 * math.sqrt(variance / 400)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 300), st.integers(1, 200), st.integers(0, 2**64 - 1))
def test_levels_are_whole_steps_of_the_norm(levels: int, bucket: int, count: int, key: int) -> None:
    x, code = gaussian(count), Qsgd(levels, bucket)
    y = code.decode(code.encode(x, key), x.shape, key)
    for low in range(0, count, bucket):
        norm = x[low : low + bucket].double().norm()
        steps = y[low : low + bucket].double() / norm * levels
        assert float((steps - steps.round()).abs().max()) < 1e-5
        assert float((steps - x[low : low + bucket].double() / norm * levels).abs().max()) <= 1 + 1e-5


def test_zeros_stay() -> None:
    x = torch.zeros(100)
    code = Qsgd(2, 32)
    assert torch.equal(code.decode(code.encode(x, 3), x.shape, 3), x)


def test_one_level_of_a_large_bucket_takes_half_a_bit() -> None:
    x = gaussian(1 << 16)
    assert len(Qsgd(1, bucket=128).encode(x, 0)) * 8 / x.numel() < 0.75


def test_damage_is_seen() -> None:
    code = Qsgd(1, 64)
    data = code.encode(gaussian(1000), 0)
    with pytest.raises(ValueError, match=r"bytes|symbols"):
        code.decode(data[:-4], (1000,), 0)
    with pytest.raises(ValueError, match="finite"):
        code.encode(torch.tensor([math.nan]), 0)
