"""EDEN: the slow equation with explicit matrices, its errors as published, no bias, only tensors out of any bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codec_checks import (
    assert_same_bits_everywhere,
    assert_takes_finite_float32_and_a_key,
    cosine,
    decoded_or_refused,
    draw,
    left_over,
    passed,
    spoilt,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thinwire.compress.codecs.blocks import CENTROIDS
from thinwire.compress.codecs.eden import PIECE, SMALLEST, Eden, _hadamard, _sizes
from thinwire.streams import words

CODECS = [Eden(bits) for bits in (0.5, 1, 2, 3, 4)]
VNMSE = {0.5: 2.14, 1: 0.571, 2: 0.133, 3: 0.0357, 4: 0.0096}
# of the bytes and of what they decode to: what a change of them orphans is every recorded frame
DIGESTS = {
    0.5: "252364920ae59f65",
    1: "6628836014b2510b",
    2: "a12d75fc9565ddb4",
    3: "fe0e588e553b601d",
    4: "2689bf469d857871",
}


def name(codec: Eden) -> str:
    return f"{codec.bits:g}"


def hadamard(size: int) -> NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotation(key: int, piece: int, d: int, picked: bool) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """R of a piece, float64 [d, d], and the coordinates that are sent."""
    drawn = words(key, [piece], d // 32 + d // 128)[0]
    bits = np.unpackbits(drawn.astype("<u8").view(np.uint8), bitorder="little").astype(np.int64)
    one, two, picks = bits[:d], bits[d : 2 * d], bits[2 * d : 2 * d + d // 2]
    h = hadamard(d)
    r = h @ np.diag(1.0 - 2 * two) @ h @ np.diag(1.0 - 2 * one) / d
    return r, 2 * np.arange(d // 2) + picks if picked else np.arange(d)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 2048])
def test_the_fast_transform_is_the_matrix(size: int) -> None:
    # of small integers, so that float32 is exact
    x = np.random.default_rng(size).integers(-100, 100, size).astype(np.float32)
    wanted = hadamard(size) @ x
    _hadamard(x)
    assert np.array_equal(x, wanted)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("law", ["gauss", "t3", "skewed"])
@pytest.mark.parametrize("count", [100, 512, 700])
def test_it_is_the_equation(codec: Eden, law: str, count: int) -> None:
    key, x = 99, draw(law, count, seed=count)
    data = codec.encode(x, key)
    found = codec.decode(data, (count,), key)
    width = max(1, int(codec.bits))
    half = np.array(CENTROIDS[width])
    levels = np.concatenate([-half[::-1], half])
    at, start = 0, 0
    for piece, d in enumerate(_sizes(count, codec.bits)):
        part = x.numpy().astype(np.float64)[start : start + d]
        r, sent = rotation(key, piece, d, codec.bits < 1)
        z = r @ np.pad(part, (0, d - part.size))
        y = z[sent] * math.sqrt(d) / np.linalg.norm(part)
        scale = float(np.frombuffer(data, "<f4", 1, at)[0])
        body = np.frombuffer(data, np.uint8, sent.size * width // 8, at + 4)
        codes = np.unpackbits(body, bitorder="little").reshape(-1, width).astype(np.int64) @ (1 << np.arange(width))
        distances = np.abs(y[:, None] - levels)
        assert np.allclose(distances[np.arange(y.size), codes], distances.min(1), rtol=0, atol=1e-5)
        q = np.zeros(d)
        q[sent] = levels[codes]
        assert scale == pytest.approx(part @ part / (q @ z), rel=1e-5)
        wanted = scale * (r.T @ q)[: part.size]
        assert np.allclose(found[start : start + d].numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        at, start = at + 4 + body.size, start + d
    assert at == len(data)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("law", ["gauss", "even", "t3", "skewed", "two"])
def test_the_error_is_the_published_one_for_any_vector(codec: Eden, law: str) -> None:
    x = draw(law, 1 << 18)
    errors = [left_over(x, passed(codec, x, key)) for key in range(3)]
    # a skewed vector is nearly all in few places, and so is its error: that varies from key to key
    assert np.mean(errors) == pytest.approx(VNMSE[codec.bits], rel=0.02 if law in ("gauss", "even") else 0.04)


@pytest.mark.parametrize(
    ("bits", "law", "wanted"),
    [
        (0.5, "gauss", 0.564),
        (0.5, "t3", 0.564),
        (1, "gauss", 0.798),
        (1, "even", 0.798),
        (2, "t3", 0.939),
        (4, "t3", 0.995),
    ],
)
def test_cosines_of_the_table(bits: float, law: str, wanted: float) -> None:
    x = draw(law, 1 << 18)
    assert cosine(x, passed(Eden(bits), x)) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("law", ["gauss", "t3", "two"])
def test_the_mean_over_keys_is_the_input(codec: Eden, law: str) -> None:
    keys, x = 400, draw(law, 1024)
    total, errors = torch.zeros(1024, dtype=torch.float64), 0.0
    for key in range(keys):
        found = passed(codec, x, key)
        total += found
        errors += left_over(x, found) / keys
    # independent errors without bias: their mean has 1 / keys of their variance
    assert left_over(x, total / keys) == pytest.approx(errors / keys, rel=0.25)
    if law == "two":
        assert float(total[1] / keys) == pytest.approx(0.5, abs=5 * math.sqrt(errors / 1024 / keys) * 1.2)


def test_errors_under_different_keys_average_out() -> None:
    x = draw("t3", 1 << 14)
    mean = sum(passed(Eden(1), x, key).double() for key in range(16)) / 16
    assert left_over(x, mean) == pytest.approx(0.571 / 16, rel=0.05)
    assert not torch.equal(passed(Eden(1), x, 0), passed(Eden(1), x, 1))


@pytest.mark.parametrize("codec", CODECS, ids=name)
@given(count=st.integers(0, 3 * PIECE))
def test_pieces_cover_all_in_few_bytes(codec: Eden, count: int) -> None:
    sizes = [PIECE] * (count // PIECE) + list(_sizes(count % PIECE, codec.bits))
    assert sum(sizes) >= count
    assert sum(sizes[:-1]) < max(count, 1)
    assert all(SMALLEST <= d <= PIECE and d & (d - 1) == 0 for d in sizes)
    size = codec.size(count)
    assert size == sum(4 + int(d * codec.bits) // 8 for d in sizes)
    rest = count % PIECE
    padded = 1 << max(7, (rest - 1).bit_length()) if rest else 0
    binary = [1 << i for i in range(7, 16) if rest >> i & 1] + [SMALLEST] * bool(rest % SMALLEST)
    for other in ([padded] if padded else [], binary):
        assert size <= codec.size(count - rest) + sum(4 + int(d * codec.bits) // 8 for d in other)
    assert size <= (count + SMALLEST) * codec.bits / 8 + 4 * (count // PIECE + 10)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (129,), (PIECE,), (PIECE + 1,), (3, PIECE // 2 + 77)])
def test_shapes_sizes_and_quality_of_any_length(codec: Eden, shape: tuple[int, ...]) -> None:
    x = draw("gauss", math.prod(shape)).reshape(shape) * 1e-5
    data = codec.encode(x, 5)
    assert len(data) == codec.size(x.numel())
    found = codec.decode(memoryview(bytearray(b"." + data))[1:], shape, 5)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    if x.numel() > 100:
        assert left_over(x, found) < 1.3 * VNMSE[codec.bits]


@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_powers_of_two_change_the_scale_alone(codec: Eden) -> None:
    x = draw("t3", 256)
    x = x / x.abs().max()
    data = codec.encode(x, 1)
    for power in (-100, 100, 120):
        other = codec.encode(x * 2.0**power, 1)
        assert other[4:] == data[4:]
        assert np.frombuffer(other, "<f4", 1)[0] == np.frombuffer(data, "<f4", 1)[0] * np.float32(2.0**power)


@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_zeros_and_the_ends_of_float32(codec: Eden) -> None:
    x = torch.zeros(PIECE + 300)
    x[PIECE:] = draw("gauss", 300)
    found = passed(codec, x)
    assert (found[:PIECE].numpy().view(np.uint32) == 0).all()
    assert (found[PIECE:] != 0).any()
    largest = torch.finfo(torch.float32).max
    for x in (torch.full((256,), largest), draw("gauss", 256).sign() * largest, torch.full((256,), 1e-45)):
        assert passed(codec, x).isfinite().all()
    assert cosine(draw("gauss", 256), passed(codec, draw("gauss", 256) * 1e-38) * 1e38) > 0.4


@pytest.mark.parametrize("codec", CODECS, ids=name)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_from_anywhere_are_a_finite_tensor_or_a_value_error(codec: Eden, data: st.DataObject) -> None:
    bad = spoilt(data, codec.encode(draw("gauss", 200), 3), head=4)
    shape = data.draw(st.sampled_from([(200,), (2, 100), (256,), (257,), (128,), (0,), (2**40, 2**40), (-2, -100)]))
    decoded_or_refused(codec, bad, shape)


@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_what_no_encoder_makes_is_refused(codec: Eden) -> None:
    good = codec.encode(draw("gauss", 200), 0)
    for bad in (good[:-1], good + b"\0", b""):
        with pytest.raises(ValueError, match=f"bytes for 200 elements, expected {len(good)}"):
            codec.decode(bad, (200,), 0)
    for scale in (math.inf, -math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match="scale"):
            codec.decode(np.array(scale, "<f4").tobytes() + good[4:], (200,), 0)
    # as large as a scale can be
    top = codec.decode(np.array(3.4e38, "<f4").tobytes() + good[4:], (200,), 0)
    assert top.isfinite().all()


def test_bad_input_is_refused() -> None:
    assert_takes_finite_float32_and_a_key(Eden(1))
    for bits in (0, 0.25, 1.5, 5, 8):
        with pytest.raises(ValueError, match="bits"):
            Eden(bits)


@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_every_machine_and_thread_makes_the_same_bits(codec: Eden) -> None:
    assert_same_bits_everywhere(codec, PIECE + 5000, DIGESTS[codec.bits])


@pytest.mark.parametrize("bits", [1, 2])
def test_error_feedback_would_work_from_one_bit_on(bits: float) -> None:
    steady, residue = draw("t3", 1024), torch.zeros(1024)
    summed, sent = torch.zeros(2, 1024, dtype=torch.float64)
    for turn in range(100):
        x = steady + 0.3 * draw("gauss", 1024, seed=turn + 1)
        found = passed(Eden(bits), x + residue, turn)
        residue = x + residue - found
        summed, sent = summed + x, sent + found
    assert left_over(summed, sent) < 0.02**2
