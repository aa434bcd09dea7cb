"""Symbols under one table: what goes in comes out, near its entropy, and damage is an error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress.entropy import static


@settings(deadline=None)  # the first example compiles
@given(st.integers(0, 500), st.integers(1, 16), st.integers(0, 15), st.integers(0, 1000))
def test_round_trip(count: int, kinds: int, lowest: int, seed: int) -> None:
    """From one kind of symbol to all sixteen, with and without the first."""
    drawn = np.random.default_rng(seed).integers(0, kinds, count)
    symbols = ((drawn + lowest) % 16).astype(np.uint8)
    data = static.encode(symbols)
    assert (static.decode(data, count) == symbols).all()
    assert bool(data) == bool(symbols.any())


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.999])
def test_it_takes_the_entropy(ratio: float) -> None:
    symbols = np.minimum(np.random.default_rng(0).geometric(ratio, 300_000) - 1, 15).astype(np.uint8)
    _, counts = np.unique(symbols, return_counts=True)
    entropy = float(-(counts * np.log2(counts / symbols.size)).sum()) / 8
    assert entropy < len(static.encode(symbols)) < 1.01 * entropy + 80


def test_a_rare_symbol_has_a_slot() -> None:
    symbols = np.full(100_000, 3, np.uint8)
    symbols[77] = 15
    data = static.encode(symbols)
    assert (static.decode(data, symbols.size) == symbols).all()
    assert len(data) < 120


@pytest.mark.parametrize("count", [999, 1000])
@pytest.mark.parametrize("damage", ["short", "odd", "cut", "longer", "shares", "whole", "word"])
def test_damage_is_an_error(damage: str, count: int) -> None:
    symbols = np.random.default_rng(1).integers(0, 7, count).astype(np.uint8)
    data = static.encode(symbols)
    hurt = {
        "short": data[:40],
        "odd": data + b"\0",
        "cut": data[:-4],
        "longer": data + bytes(4),
        "shares": b"\xff" + data[1:],
        "whole": (4096).to_bytes(2, "little") + bytes(30) + data[32:],
        "word": data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
    }[damage]
    with pytest.raises(ValueError, match="coded symbols"):
        static.decode(hurt, count)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_are_symbols_or_an_error(data: bytes, count: int) -> None:
    try:
        found = static.decode(data, count)
    except ValueError:
        return
    assert found.size == count
    assert found.max(initial=0) < 16
