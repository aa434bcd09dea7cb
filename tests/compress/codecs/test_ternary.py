"""Ternary: bytes and numbers the slow way, sizes near the entropy, a contraction, only tensors out of any bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codec_checks import (
    assert_same_bits_everywhere,
    assert_takes_finite_float32_and_a_key,
    decoded_or_refused,
    draw,
    left_over,
    passed,
    spoilt,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thinwire.compress.codecs.ternary import WHOLE, Ternary

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
# of the bytes and of what they decode to: what a change of them orphans is every recorded frame
DIGESTS = {0.02: "8dd0aec53a024faf", 0.5: "ec49c529296e950e", 1.0: "b2dd4e3659c3ed14"}


def bfloat(value: float) -> np.float32:
    """The nearest bfloat16 that a scale may be; 0 of what is too small is the codec's own rule."""
    return np.float32(min(float(torch.tensor(value, dtype=torch.float64).float().bfloat16()), 3.3895313892515355e38))


def slow(x: NDArray[np.float32], density: float, block: int) -> tuple[list[int], list[np.float32], NDArray[np.float32]]:
    """The symbols, the scales and the decoded numbers: a stable sort leaves equals in their order."""
    symbols, scales, out = [0] * x.size, [], np.zeros_like(x)
    for start in range(0, x.size, block):
        part = x[start : start + block]
        order = np.argsort(-np.abs(part), kind="stable")[: max(1, round(density * part.size))]
        total = math.fsum(np.abs(part[order]).astype(np.float64).tolist())
        scale = bfloat(total / order.size) if np.abs(part).max() >= 2.0**-100 else np.float32(0)
        scales.append(scale)
        for i in order:
            plus = bool(part[i] >= 0) or scale == 0
            symbols[start + int(i)] = 2 if plus else 1
            out[start + i] = scale if plus else -scale
    return symbols, scales, out


def coded(symbols: list[int]) -> bytes:
    """rANS in whole numbers, as the docstring of `entropy.rans` has it, with one state."""
    sent = sum(s > 0 for s in symbols)
    share = 1 << 15 if sent == len(symbols) else min((1 << 15) - 1, max(1, round(sent * (1 << 15) / len(symbols))))
    sizes = [(1 << 16) - 2 * share, share, share]
    starts = [0, sizes[0], sizes[0] + share]
    x, emitted = 1 << 31, []
    for s in reversed(symbols):
        if x >= sizes[s] << 47:
            emitted.append(x & 0xFFFFFFFF)
            x >>= 32
        x = (x // sizes[s] << 16) + x % sizes[s] + starts[s]
    return b"".join(word.to_bytes(4, "little") for word in (x & 0xFFFFFFFF, x >> 32, *reversed(emitted)))


def entropy(density: float) -> float:
    """Bits a number of places and signs."""
    return density + sum(-p * math.log2(p) for p in (density, 1 - density) if p)


@settings(deadline=None)
@given(
    st.lists(st.one_of(FLOATS, st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-38, 1e-45])), min_size=1, max_size=70),
    st.sampled_from([0.001, 0.2, 0.5, 0.7, 0.99, 1.0]),
    st.sampled_from([1, 8, 13, 64, WHOLE]),
)
def test_bytes_and_numbers_are_those_of_the_docstring(values: list[float], density: float, block: int) -> None:
    codec, x = Ternary(density, block), torch.tensor(values, dtype=torch.float32)
    symbols, scales, wanted = slow(x.numpy(), density, block)
    head = (np.array(scales, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    data = codec.encode(x, 5)
    assert data == head + coded(symbols)
    assert np.array_equal(codec.decode(data, x.shape, 5).numpy(), wanted)
    assert torch.equal(codec.decode(memoryview(bytearray(b"." + data))[1:], (1, x.numel()), 5)[0], passed(codec, x))
    least, most = codec.sizes(x.numel())
    assert least <= len(data) <= most


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("count", [8192, 115_200])
def test_bytes_are_the_entropy_and_a_few(density: float, count: int) -> None:
    codec, x = Ternary(density), draw("gauss", count)
    least, most = codec.sizes(count)
    bound = count * entropy(max(1, round(density * count)) / count) / 8
    assert least <= len(codec.encode(x, 0)) <= most
    assert most - least <= 4 + count * 2.0**-16
    assert bound < most <= 1.001 * bound + 12


@settings(deadline=None)
@given(
    st.lists(
        st.floats(-(2.0**50), 2.0**50, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-50), min_size=1, max_size=70
    ),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.sampled_from([8, WHOLE]),
)
def test_it_contracts(values: list[float], density: float, block: int) -> None:
    codec, x = Ternary(density, block), torch.tensor(values, dtype=torch.float32)
    found = passed(codec, x)
    before, after = (float(v.double().square().sum()) for v in (x, x - found))
    # of the k sent, sum (|x| - s)^2 = sum |x|^2 - k s^2; that is 1 / k of their square at least, so 1 / n of all
    assert after <= before * (1 - 0.98 / len(values)) + 1e-5 * before / len(values)
    assert torch.equal(found, passed(codec, x))


@pytest.mark.parametrize(("density", "wanted"), [(0.05, 0.273), (0.25, 0.678), (0.5, 0.808), (1.0, 0.637)])
def test_energies_of_the_table(density: float, wanted: float) -> None:
    x = draw("gauss", 1 << 18)
    assert 1 - left_over(x, passed(Ternary(density), x)) == pytest.approx(wanted, abs=0.006)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (4097,), (2, 0, 3), (2, 3, 2048)])
def test_shapes(shape: tuple[int, ...]) -> None:
    codec, x = Ternary(0.1, 64), draw("gauss", math.prod(shape)).reshape(shape) * 1e-5
    data = codec.encode(x, 0)
    found = codec.decode(data, shape, 0)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    assert bool(data) == bool(x.numel())
    assert (found * x >= 0).all()


def test_zeros_and_the_ends_of_float32() -> None:
    codec, largest = Ternary(0.1, 512), torch.finfo(torch.float32).max
    assert (passed(codec, torch.zeros(5000)).numpy().view(np.uint32) == 0).all()
    for x in (draw("gauss", 5000).sign() * largest, torch.full((5000,), 1e-45), draw("gauss", 5000) * 1e-39):
        assert passed(codec, x).isfinite().all()
    x = torch.full((512,), -largest)
    assert float(passed(Ternary(1.0), x).min()) < -0.98 * largest


def test_what_was_decoded_is_encoded_again() -> None:
    x = draw("t3", 1000)
    once = passed(Ternary(0.1, 128), x)
    assert torch.equal(passed(Ternary(0.1, 128), once), once)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bytes_from_anywhere_are_a_finite_tensor_or_a_value_error(data: st.DataObject) -> None:
    codec = Ternary(data.draw(st.sampled_from([0.01, 0.2, 0.9, 1.0])), data.draw(st.sampled_from([32, WHOLE])))
    bad = spoilt(data, codec.encode(draw("gauss", 100), 3), most=4, cuts=[-8, -4, -1, 0, 0, 0, 1, 4, 8])
    shape = data.draw(st.sampled_from([(100,), (5, 20), (99,), (128,), (0,), (2**40, 2**40), (-5, -20)]))
    if (found := decoded_or_refused(codec, bad, shape)) is not None:
        assert int((found != 0).sum()) <= sum(
            max(1, round(codec.density * min(codec.block, math.prod(shape) - low)))
            for low in range(0, math.prod(shape), codec.block)
        )
        # one encoding, and no other bytes for it
        assert codec.encode(found, 3) == bad or (found == 0).all() or not _same_scales(codec, found, bad)


def _same_scales(codec: Ternary, found: torch.Tensor, bad: bytes) -> bool:
    """Whether the scales are such as survive: a block of 0s loses its signs, and places that were 0 are not found."""
    return all(0x1000 < int(s) < 0x7F00 for s in np.frombuffer(bad[: 2 * -(-found.numel() // codec.block)], "<u2"))


def test_what_no_encoder_makes_is_refused() -> None:
    codec, count = Ternary(0.1, 1000), 5000
    good = codec.encode(draw("gauss", count), 0)
    for bad in (b"", good[:-8], good + bytes(8), good[:-1]):
        with pytest.raises(ValueError, match="bytes for 5000 elements, expected"):
            codec.decode(bad, (count,), 0)
    for bad in (good[:-4] + b"\0\0\0\0", good[:14] + b"\1" + good[15:], good[:10] + bytes(len(good) - 10)):
        with pytest.raises(ValueError, match="do not fit their blocks"):
            codec.decode(bad, (count,), 0)
    for scale in (b"\x80\x7f", b"\xc0\x7f", b"\x80\xff", b"\x00\xbf", b"\x80\x80"):
        with pytest.raises(ValueError, match="scale"):
            codec.decode(scale + good[2:], (count,), 0)
    with pytest.raises(ValueError, match="expected"):
        codec.decode(good, (1 << 50,), 0)
    with pytest.raises(ValueError, match="bytes for 0 elements"):
        codec.decode(good, (0,), 0)


def test_right_numbers_in_the_wrong_blocks_are_refused() -> None:
    for places in (range(30), [*range(20), *range(200, 210)], [*range(20), *range(100, 110)]):  # of three blocks
        x = torch.zeros(300)
        x[list(places)] = draw("gauss", 30)
        data = Ternary(0.1).encode(x, 0)
        with pytest.raises(ValueError, match="do not fit their blocks"):
            Ternary(0.1, 100).decode(2 * data[:2] + data, (300,), 0)


def test_bad_input_is_refused() -> None:
    assert_takes_finite_float32_and_a_key(Ternary(0.1))
    for density in (0, 0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^density .* is not in \(0, 1\]$"):
            Ternary(density)
    for block in (0, -1, WHOLE + 1):
        with pytest.raises(ValueError, match="block"):
            Ternary(0.1, block)


@pytest.mark.parametrize("density", list(DIGESTS))
def test_every_machine_and_thread_makes_the_same_bits(density: float) -> None:
    assert_same_bits_everywhere(Ternary(density, 4096), 10_000, DIGESTS[density])
