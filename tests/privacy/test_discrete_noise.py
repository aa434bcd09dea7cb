"""Discrete noise has the law that is stated, and truncation never makes a part longer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.privacy.integers import TAIL, of_uniform, truncated, within
from thinwire.privacy.secrets import SystemSecrets

DRAWS = 1_000_000


@pytest.mark.parametrize("deviation", [8, 4096])
def test_a_million_draws_have_the_stated_law(deviation: int) -> None:
    found = SystemSecrets().integers(DRAWS, deviation)
    assert found.dtype == np.int64
    assert abs(found.std() / deviation - 1) < 0.005
    assert abs(found.mean()) < 6 * deviation / math.sqrt(DRAWS)
    assert abs(float(np.mean((found / deviation) ** 4)) - 3) < 6 * math.sqrt(
        96 / DRAWS
    )  # its tails, not its width alone
    for bound in (0.5, 1, 2, 3):
        whole = (math.floor(bound * deviation) + 0.5) / deviation
        share = math.erf(whole / math.sqrt(2))
        assert abs(np.mean(np.abs(found) <= bound * deviation) - share) < 6 * math.sqrt(share / DRAWS)


def test_each_point_has_its_own_probability() -> None:
    """Of evenly spread words as many fall on each point as its share says: the table itself is checked, not luck."""
    words = np.arange(1 << 20, dtype=np.uint64) << np.uint64(44)
    points, counts = np.unique(of_uniform(words, 8), return_counts=True)
    weights = np.exp(-(points.astype(float) ** 2) / 128)
    shares = weights / np.exp(-(np.arange(-TAIL * 8, TAIL * 8 + 1) ** 2) / 128).sum()
    assert np.abs(counts / (1 << 20) - shares).max() < 2e-6


@pytest.mark.parametrize("deviation", [0, 7, (1 << 20) + 1])
def test_a_deviation_whose_law_would_be_another_is_refused(deviation: int) -> None:
    with pytest.raises(ValueError, match="deviation"):
        of_uniform(np.zeros(1, np.uint64), deviation)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.floats(1e-3, 1e3)
)
def test_what_is_cut_is_no_longer_than_the_bound(numbers: list[float], clip: float) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    unit = clip / 1000
    found = truncated(x, within(float(x.double().norm()), clip), unit)
    assert float(found.double().norm()) * unit <= clip * (1 + 1e-9)


def test_what_is_no_number_counts_as_nothing() -> None:
    assert within(math.nan, 1.0) == within(math.inf, 1.0) == 0.0
    assert truncated(torch.tensor([math.nan, math.inf, -2.5]), 1.0, 1.0).tolist() == [0, 0, -2]
