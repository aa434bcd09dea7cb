"""Sketches: signs of explicit projections, the energy they carry, a contraction, only tensors out of any bytes."""

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

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.eden import PIECE, Eden
from thinwire.compress.codecs.sketch import Sketch
from thinwire.streams import words

# of the bytes and of what they decode to: what a change of them orphans is every recorded frame
DIGESTS = {0.3: "e54749eae34c37fd", 1.0: "29c8e45ae98564f9"}


def rotation(key: int, piece: int, d: int) -> NDArray[np.float64]:
    """R of a piece, float64 [d, d], with explicit matrices."""
    bits = np.unpackbits(words(key, [piece], d // 32)[0].astype("<u8").view(np.uint8), bitorder="little").astype(int)
    h = np.ones((1, 1))
    while len(h) < d:
        h = np.block([[h, h], [h, -h]])
    return h @ np.diag(1.0 - 2 * bits[d:]) @ h @ np.diag(1.0 - 2 * bits[:d]) / d


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sides", [(128,), (256, 128), (512,)])
def test_it_is_the_equation(ratio: float, sides: tuple[int, ...]) -> None:
    key, codec = 99, Sketch(ratio)
    count = sum(sides) - (50 if len(sides) > 1 else 0)
    x = draw("t3", count, seed=count)
    data = codec.encode(x, key)
    found = codec.decode(data, (count,), key)
    at, start = 0, 0
    for piece, d in enumerate(sides):
        part, m = x.numpy().astype(np.float64)[start : start + d], math.ceil(ratio * d)
        r = rotation(key, piece, d)
        z = r @ np.pad(part, (0, d - part.size))
        scale = float((np.frombuffer(data, "<u2", 1, at).astype(np.uint32) << 16).view(np.float32)[0])
        body = np.frombuffer(data, np.uint8, -(-m // 8), at + 2)
        plus = np.unpackbits(body, bitorder="little")
        assert not plus[m:].any()
        q = np.where(plus[:m], 1.0, -1.0)
        assert (q * z[:m] > -1e-5 * np.abs(z).max()).all()
        assert scale == pytest.approx(np.abs(z[:m]).mean(), rel=2.0**-8)
        wanted = scale * (r[:m].T @ q)[: part.size]
        assert np.allclose(found[start : start + d].numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        at, start = at + 2 + body.size, start + d
    assert at == len(data) == codec.size(count)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("law", ["gauss", "t3", "one"])
def test_it_carries_its_share_of_any_vector(ratio: float, law: str) -> None:
    x = draw(law, 1 << 12)
    errors = [left_over(x, passed(Sketch(ratio), x, key)) for key in range(60)]
    assert np.mean(errors) == pytest.approx(1 - 2 / math.pi * ratio, abs=0.015)


def test_at_ratio_one_it_is_eden_at_another_length() -> None:
    x = draw("t3", 5000)
    mine, theirs = passed(Sketch(1.0), x), Eden(1).decode(Eden(1).encode(x, 1), x.shape, 1)
    assert float(torch.cosine_similarity(mine[:4096], theirs[:4096], dim=0)) > 0.99999
    assert left_over(x, mine) < 0.38 < left_over(x, theirs)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.floats(-(2.0**50), 2.0**50, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-50), min_size=1, max_size=300
    ),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.integers(0, 2**64 - 1),
)
def test_it_contracts(values: list[float], ratio: float, key: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    found = passed(Sketch(ratio), x, key)
    before, after = (float(v.double().square().sum()) for v in (x, x - found))
    d = 128 << (len(values) > 128) << (len(values) > 256)
    # a key may have all of x beside its projections; with as many of them as numbers none can
    assert after <= before * (1 + 1e-5 - (0.98 / d if ratio == 1 else 0))


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (129,), (PIECE + 1,)])
def test_shapes_and_sizes(shape: tuple[int, ...]) -> None:
    codec, x = Sketch(0.5), draw("gauss", math.prod(shape)).reshape(shape) if math.prod(shape) else torch.zeros(shape)
    data = codec.encode(x * 1e-5, 5)
    pieces = {0: [], 1: [128], 15: [128], 129: [256], PIECE + 1: [PIECE, 128]}[x.numel()]
    assert len(data) == codec.size(x.numel()) == sum(Blocks(1, d).size(d // 2) for d in pieces)
    found = codec.decode(memoryview(bytearray(b"." + data))[1:], shape, 5)
    assert found.dtype == torch.float32
    assert found.shape == x.shape


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_zeros_and_the_ends_of_float32(ratio: float) -> None:
    codec, largest = Sketch(ratio), torch.finfo(torch.float32).max
    x = torch.zeros(PIECE + 300)
    x[PIECE:] = draw("gauss", 300)
    found = passed(codec, x)
    assert (found[:PIECE].numpy().view(np.uint32) == 0).all()
    assert (found[PIECE:] != 0).any()
    for x in (torch.full((256,), largest), draw("gauss", 256).sign() * largest, torch.full((256,), 1e-45)):
        assert passed(codec, x).isfinite().all()
    assert passed(codec, passed(codec, draw("gauss", 256))).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_from_anywhere_are_a_finite_tensor_or_a_value_error(data: st.DataObject) -> None:
    codec = Sketch(data.draw(st.sampled_from([0.013, 0.5, 1.0])))
    bad = spoilt(data, codec.encode(draw("gauss", 200), 3), head=2)
    shape = data.draw(st.sampled_from([(200,), (2, 100), (256,), (257,), (128,), (0,), (2**40, 2**40), (-2, -100)]))
    decoded_or_refused(codec, bad, shape)


def test_what_no_encoder_makes_is_refused() -> None:
    codec = Sketch(0.3)
    good = codec.encode(draw("gauss", 200), 0)
    for bad in (good[:-1], good + b"\0", b""):
        with pytest.raises(ValueError, match=f"bytes for 200 elements, expected {len(good)}"):
            codec.decode(bad, (200,), 0)
    for scale in (b"\x80\x7f", b"\xc0\x7f", b"\x80\xff", b"\x00\xbf"):
        with pytest.raises(ValueError, match="scale"):
            codec.decode(scale + good[2:], (200,), 0)
    with pytest.raises(ValueError, match="after the last"):
        codec.decode(good[:-1] + b"\xff", (200,), 0)


def test_bad_input_is_refused() -> None:
    assert_takes_finite_float32_and_a_key(Sketch(1))
    for ratio in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"^ratio .* is not in \(0, 1\]$"):
            Sketch(ratio)


@pytest.mark.parametrize("ratio", list(DIGESTS))
def test_every_machine_makes_the_same_bits(ratio: float) -> None:
    assert_same_bits_everywhere(Sketch(ratio), 5000, DIGESTS[ratio])
