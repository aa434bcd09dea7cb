"""The learned codec: bytes within the budget, better than what knows nothing of updates, damage seen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import update

from thinwire.compress.codecs.eden import Eden
from thinwire.compress.learned import codebooks
from thinwire.compress.learned.components import Components
from thinwire.compress.learned.lora_image import Image

SHAPES = {f"{i}.{f}": (8, 256) if f == "A" else (width, 8) for i, width in enumerate((256, 64, 256)) for f in "AB"}
IMAGE = Image.packed(SHAPES, 1)
TABLES = codebooks.fit(IMAGE, [update(IMAGE, seed) for seed in range(4)], most=1 << 13, rounds=1)


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / x.norm() / y.norm())


def code(ratio: int) -> Components:
    return Components(IMAGE, 4 * IMAGE.count // ratio, TABLES)


@pytest.mark.parametrize("ratio", [16, 32, 64])
def test_within_the_budget_and_better_than_eden(ratio: int) -> None:
    x, codec, eden = update(IMAGE, 100), code(ratio), Eden(32 / ratio)
    data = codec.encode(x, 0)
    assert 0.95 * codec.size < len(data) <= codec.size
    mine = cosine(x, codec.decode(data, x.shape, 0))
    assert mine > cosine(x, eden.decode(eden.encode(x, 0), x.shape, 0)) + 0.03


def test_tables_that_know_nothing_serve_too() -> None:
    plain, x = Components(IMAGE, 4 * IMAGE.count // 64, codebooks.untrained()), update(IMAGE, 100)
    untaught = cosine(x, plain.decode(plain.encode(x, 0), x.shape, 0))
    assert 0.6 < untaught < cosine(x, code(64).decode(code(64).encode(x, 0), x.shape, 0)) + 0.02


def test_it_carries_this_update_and_no_other() -> None:
    """The shifted-pair control: what client 2 sent holds nothing of client 1's update."""
    codec, x, y = code(64), update(IMAGE, 100), update(IMAGE, 101)
    other = codec.decode(codec.encode(y, 0), y.shape, 0)
    assert abs(cosine(x, other)) < 0.1 < 0.7 < cosine(y, other)


def test_signs_turn_with_the_update() -> None:
    codec, x = code(64), update(IMAGE, 7)
    plus, minus = (codec.decode(codec.encode(s * x, 0), x.shape, 0) for s in (1, -1))
    assert cosine(plus, minus) < -0.9


def test_the_size_of_an_update_comes_through_without_saturation() -> None:
    codec, x = code(64), update(IMAGE, 7)
    for factor in (0.1, 1.0, 20.0):
        y = codec.decode(codec.encode(factor * x, 0), x.shape, 0)
        assert float((x * y).sum() / x.square().sum()) == pytest.approx(factor, rel=1e-3)
    least = replace(codec, contract=True)
    assert float(least.decode(least.encode(x, 0), x.shape, 0).norm()) <= 1.01 * float(x.norm())


def test_error_feedback_sends_everything_in_the_end() -> None:
    codec, x = replace(code(32), contract=True), update(IMAGE, 3)
    kept, sent = torch.zeros_like(x), torch.zeros_like(x)
    for round in range(12):
        decoded = codec.decode(codec.encode(x + kept, round), x.shape, round)
        sent, kept = sent + decoded, x + kept - decoded
    torch.testing.assert_close(sent + kept, 12 * x, rtol=1e-3, atol=1e-5)
    assert float(kept.norm()) < 2 * float(x.norm())


def test_zero_is_zero_and_not_finite_is_refused() -> None:
    codec = code(64)
    zero = torch.zeros(IMAGE.height, IMAGE.width)
    assert torch.equal(codec.decode(codec.encode(zero, 0), zero.shape, 0), zero)
    zero[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        codec.encode(zero, 0)


def test_factors_of_zero_among_others() -> None:
    """After one step from B = 0 every A has not moved at all."""
    codec = code(64)
    factors = IMAGE.unstack(update(IMAGE, 5))
    x = IMAGE.stack({name: torch.zeros_like(t) if name.endswith("A") else t for name, t in factors.items()})
    y = IMAGE.unstack(codec.decode(codec.encode(x, 0), x.shape, 0))
    assert all(not y[name].any() for name in SHAPES if name.endswith("A"))
    assert cosine(x, IMAGE.stack(y)) > 0.8


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 255), st.booleans())
def test_damage_is_an_error_or_another_finite_update(place: int, change: int, cut: bool) -> None:
    codec, x = code(64), update(IMAGE, 1)
    data = bytearray(codec.encode(x, 0))
    at = place % len(data)
    data[at] ^= change
    try:
        y = codec.decode(bytes(data[:at] if cut else data), x.shape, 0)
    except ValueError:
        return
    assert bool(torch.isfinite(y).all())


def test_scales_beyond_those_trained_on_are_refused() -> None:
    codec, x = code(64), update(IMAGE, 1)
    with pytest.raises(ValueError, match="beyond those trained on"):
        codec.decode(codec.encode(1e4 * x, 0), x.shape, 0)
    with pytest.raises(ValueError, match="not"):
        codec.decode(codec.encode(x, 0), (3, 3), 0)


@pytest.mark.parametrize("size", [8, 40, 60, 80, 150, 400])
def test_small_budgets_are_kept_or_refused(size: int) -> None:
    x = update(IMAGE, 1)
    try:
        codec = Components(IMAGE, size, TABLES)
    except ValueError:
        assert size < 60
        return
    data = codec.encode(x, 0)
    assert len(data) <= size
    assert codec.decode(data, x.shape, 0).shape == x.shape


def test_the_tables_travel_in_few_bytes() -> None:
    assert sum(t.numel() * t.element_size() for t in TABLES.values()) < 64_000
    assert np.all(np.diff(TABLES["distortion"].numpy()) <= 0)
