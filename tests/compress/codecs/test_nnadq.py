"""NNADQ against its equations the slow way: levels, bytes, the bound of its error; only tensors out of any bytes."""

from __future__ import annotations

import contextlib
import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress.codecs.nnadq import HEAD, MOST, Nnadq
from thinwire.streams import words

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def gaussian(count: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def slow(x: torch.Tensor, weight: float) -> tuple[int, float, list[float]]:
    """The paper's s and c, and what each number comes back as, one after another; m and c as float32 has them."""
    values = x.double().tolist()
    middle = float(np.float32((max(values) + min(values)) / 2))
    wide = max(abs(value - middle) for value in values)
    c = np.float32(wide)
    if float(c) < wide:
        c = np.nextafter(c, np.float32(np.inf))
    c = float(c)
    s = max(1, math.floor(math.sqrt(32 * c * math.log(4) / weight)))
    back = [middle + math.copysign(round(abs(v - middle) / c * s) * c / s, v - middle) for v in values]
    return s, c, back


@pytest.mark.parametrize("weight", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e-2, 1.0, 300.0])
def test_levels_bytes_and_numbers_are_those_of_the_rule(scale: float, weight: float) -> None:
    x, code = gaussian(1000, scale) + scale, Nnadq(weight)
    s, c, back = slow(x, weight)
    data = code.encode(x, 0)
    assert code.levels(c) == s
    # 1,000 numbers fill whole bytes: exactly the rule's bits
    assert len(data) == HEAD + 1000 * (math.ceil(math.log2(s + 1)) + 1) // 8 == code.size(1000, c)
    found = code.decode(data, x.shape, 0)
    assert torch.equal(found, torch.tensor(back, dtype=torch.float64).float())


def test_a_tensor_of_a_small_range_takes_few_bits() -> None:
    bits = [(len(Nnadq(1e-4).encode(gaussian(800, scale), 0)) - HEAD) * 8 / 800 for scale in (1e-7, 1e-5, 1e-3, 1e-1)]
    assert bits == [2, 4, 7, 10]
    shifted = Nnadq(1e-4).encode(gaussian(800, 1e-3) + 5, 0)
    assert (len(shifted) - HEAD) * 8 / 800 == 7  # what is common to all has no part in it


@settings(deadline=None, max_examples=150)
@given(st.lists(FLOATS, min_size=1, max_size=60), st.sampled_from([1e-5, 1e-3, 10.0]))
def test_the_error_is_half_a_level_at_most(values: list[float], weight: float) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    code = Nnadq(weight)
    data = code.encode(x, 1)
    found = code.decode(data, x.shape, 1)
    assert found.isfinite().all()
    c = float(np.frombuffer(data[4:8], "<f4")[0])
    rounding = float(x.double().abs().max()) * 2.0**-22 + 2.0**-148
    most = c / (2 * code.levels(c)) + rounding
    assert float((found.double() - x.double()).abs().max()) <= most
    least, largest = code.sizes(len(values))
    assert least <= len(data) <= largest


def test_one_number_alone_takes_a_head() -> None:
    for value in (0.0, 0.25, -3.5):
        data = Nnadq().encode(torch.full((7, 9), value), 0)
        assert len(data) == HEAD
        assert torch.equal(Nnadq().decode(data, (7, 9), 0), torch.full((7, 9), value))
    assert Nnadq().decode(Nnadq().encode(torch.empty(0), 0), (0,), 0).shape == (0,)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_of_any_bytes_come_finite_tensors_or_an_error(data: st.DataObject) -> None:
    code, count = Nnadq(1e-3), data.draw(st.integers(0, 40))
    good = bytearray(code.encode(gaussian(count), 0))
    for _ in range(data.draw(st.integers(0, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    bad = bytes(good) if data.draw(st.booleans()) else data.draw(st.binary(max_size=80))
    with contextlib.suppress(ValueError):
        found = code.decode(bad, (count,), 0)
        assert found.shape == (count,)
        assert found.isfinite().all()


def test_what_is_refused() -> None:
    code = Nnadq(1e-3)
    good = code.encode(torch.tensor([-1.0, 0.0, 1.0]), 0)
    assert code.levels(1.0) == 210
    for bad, why in (
        (b"1234", "fewer than the 8"),
        (good + b"0", "expected"),
        (good[:-1], "expected"),
        (np.array([np.nan, 1], "<f4").tobytes() + good[8:], "not finite"),
        (np.array([0, -1], "<f4").tobytes() + good[8:], "negative"),
        (np.array([0, np.inf], "<f4").tobytes() + good[8:], "not finite"),
        (good[:9] + bytes([255, 0, 210]), "beyond the last"),
        (good[:8] + bytes([0b011]) + good[9:], "a zero has a sign"),
        (good[:8] + bytes([0b1001]) + good[9:], "a bit set after the last"),
    ):
        with pytest.raises(ValueError, match=why):
            code.decode(bad, (3,), 0)
    with pytest.raises(ValueError, match="expected 8"):
        code.decode(np.array([0, 1], "<f4").tobytes() + b"1", (0,), 0)
    for weight in (0, -1e-4, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^coarseness "):
            Nnadq(weight)
    for bad_x in (torch.tensor([math.nan]), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"not finite|takes float32"):
            code.encode(bad_x, 0)
    assert code.levels(1e30) == MOST


def test_every_machine_makes_the_same_bits() -> None:
    x = torch.from_numpy((words(7, [0], 10000)[0].view(np.int64).astype(np.float64) * 2.0**-70).astype(np.float32))
    data = Nnadq(1e-4).encode(x, 0)
    decoded = Nnadq(1e-4).decode(data, x.shape, 0).numpy().tobytes()
    assert hashlib.sha256(data + decoded).hexdigest()[:16] == "a4d23b8037049b5f"
