"""Coded symbols: what goes in comes out, near the entropy, and damage is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress.entropy import adaptive


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 2)), max_size=200))
def test_round_trip(pairs: list[tuple[int, int]]) -> None:
    values, contexts = (np.array([pair[i] for pair in pairs], np.uint8) for i in (0, 1))
    data = adaptive.encode(values, contexts, 3)
    assert np.array_equal(adaptive.decode(data, contexts, 3), values)


def test_contexts_pay() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    contexts = draw.integers(0, 2, 40_000).astype(np.uint8)
    values = (draw.random(40_000) < np.where(contexts == 1, 0.5, 0.02)).astype(np.uint8)
    entropy = 40_000 * (0.5 + 0.5 * -(0.02 * math.log2(0.02) + 0.98 * math.log2(0.98))) / 8
    size = len(adaptive.encode(values, contexts, 2))
    assert entropy < size < 1.03 * entropy + 100
    assert size < 0.95 * len(adaptive.encode(values, np.zeros_like(contexts), 1))


@pytest.mark.parametrize("damage", ["cut", "longer", "odd", "empty"])
def test_damage_is_seen(damage: str) -> None:
    contexts = np.zeros(500, np.uint8)
    data = adaptive.encode(np.arange(500, dtype=np.uint8) % 5, contexts, 1)
    hurt = {"cut": data[:-4], "longer": data + b"\0\0\0\0", "odd": data[:-1], "empty": b""}[damage]
    with pytest.raises(ValueError, match="symbols"):
        adaptive.decode(hurt, contexts, 1)
