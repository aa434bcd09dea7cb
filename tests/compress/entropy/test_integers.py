"""Packed integers: exact, short, and nothing but integers out of whatever comes."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compress.entropy.integers import pack, unpack

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.one_of(st.integers(-3, 3), st.integers(-40_000, 40_000), INT64), max_size=300))
def test_they_come_back(values: list[int]) -> None:
    assert unpack(pack(np.array(values, dtype=np.int64)), len(values)).tolist() == values


@given(st.binary(max_size=60), st.integers(0, 20))
def test_bytes_from_anywhere_are_integers_or_a_value_error(data: bytes, count: int) -> None:
    with contextlib.suppress(ValueError):
        found = unpack(data, count)
        assert found.dtype == np.int64
        assert found.shape == (count,)


def test_what_would_unpack_to_more_is_refused_and_not_unpacked() -> None:
    bomb = b"\x01" + zstandard.ZstdCompressor().compress(bytes(1 << 28))
    with pytest.raises(ValueError, match="not 1000 of 1 bytes"):
        unpack(bomb, 1000)
    for count in (15, 17):
        with pytest.raises(ValueError, match="packed integers"):
            unpack(pack(np.arange(16)), count)


@pytest.mark.parametrize("spread", [1, 8, 30])
def test_their_size_is_near_the_entropy(spread: float) -> None:
    values = np.rint(np.random.default_rng(0).normal(0, spread, 4096)).astype(np.int64)
    _, counts = np.unique(values, return_counts=True)
    entropy = -float(np.sum(counts * np.log2(counts / 4096))) / 8
    assert len(pack(values)) < 1.06 * entropy + 120
    assert entropy == pytest.approx(4096 / 8 * math.log2(spread * math.sqrt(2 * math.pi * math.e)), rel=0.05)
