"""Top-k: the largest of each chunk and no others, places near their entropy, and only tensors out of any bytes."""

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
    passed,
    spoilt,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.topk import TopK

CODECS = [TopK(0.03, bits=bits) for bits in (16, 8, 4, 2)]
# of the bytes and of what they decode to: what a change of them orphans is every recorded frame
DIGESTS = {16: "566e89b2cf6e7502", 8: "f57d9e7aac04ab68", 4: "4fff1dbdd8417544", 2: "bd2744b4186640fa"}
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def name(codec: TopK) -> str:
    return f"{codec.bits}"


def kept(x: NDArray[np.float32], codec: TopK) -> list[NDArray[np.int64]]:
    """The places in each chunk, the slow way: a stable sort by falling magnitude leaves equals in their order."""
    found = []
    for start in range(0, x.size, codec.chunk):
        part = x[start : start + codec.chunk]
        order = np.argsort(-np.abs(part), kind="stable")
        found.append(np.sort(order[: max(1, round(codec.share * part.size))]))
    return found


def coded(places: list[NDArray[np.int64]], sizes: list[int]) -> bytes:
    """Rice's code bit by bit, as the docstring has it."""
    bits: list[int] = []
    for row, size in zip(places, sizes, strict=True):
        r = max(0, math.ceil(math.log2(size / (2 * row.size))))
        for gap in np.diff(row, prepend=-1) - 1:
            bits += [1] * (gap >> r) + [0] + [gap >> i & 1 for i in range(r)]
    return np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()


def entropy(size: int, count: int) -> float:
    """log2 of the number of ways to choose, in bits."""
    return (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y.double()).norm() / x.double().norm())


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize(
    ("share", "chunk", "count"),
    [(0.03, 4096, 9000), (0.01, 4096, 4096), (0.01, 100, 1001), (0.3, 64, 200), (1.0, 16, 50), (1e-6, 1 << 20, 300)],
)
def test_the_bytes_are_those_of_the_docstring(bits: int, share: float, chunk: int, count: int) -> None:
    codec, x = TopK(share, chunk, bits), draw("t3", count)
    places = kept(x.numpy(), codec)
    starts = range(0, count, chunk)
    every = np.concatenate([start + row for start, row in zip(starts, places, strict=True)])
    values = x[torch.from_numpy(every)]
    if bits == 16:
        head, decoded = values.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes(), values.bfloat16().float()
    else:
        blocks = Blocks(bits, block=max(1, round(share * chunk)))
        head = blocks.encode(values, 0)
        decoded = blocks.decode(head, values.shape, 0)
    data = codec.encode(x, 5)
    assert data == head + coded(places, [min(chunk, count - start) for start in starts])
    assert len(data) <= codec.most(count)
    wanted = torch.zeros(count)
    wanted[torch.from_numpy(every)] = decoded
    assert torch.equal(codec.decode(data, (count,), 5), wanted)
    assert torch.equal(codec.decode(memoryview(bytearray(b"." + data))[1:], (1, count), 5), wanted[None])


@settings(deadline=None)
@given(
    st.lists(st.one_of(FLOATS, st.sampled_from([0.0, -0.0, 1.0, -1.0])), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.2, 0.5, 1.0]),
    st.sampled_from([1, 8, 13, 64]),
)
def test_any_tensor_has_its_largest_kept_and_equals_taken_in_order(
    values: list[float], share: float, chunk: int
) -> None:
    codec, x = TopK(share, chunk), torch.tensor(values, dtype=torch.float32)
    every = np.concatenate([chunk * i + row for i, row in enumerate(kept(x.numpy(), codec))])
    found = passed(codec, x)
    wanted = torch.zeros_like(x)
    limit = torch.finfo(torch.bfloat16).max
    wanted[every] = x[every].clamp(-limit, limit).bfloat16().float()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (4097,), (2, 3, 2048)])
def test_shapes(codec: TopK, shape: tuple[int, ...]) -> None:
    x = draw("gauss", math.prod(shape)).reshape(shape) * 1e-5
    found = passed(codec, x)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    assert ((found != 0) <= (x != 0)).all()
    if x.numel():
        assert found.abs().max() == pytest.approx(float(x.abs().max()), rel=0.4)


@pytest.mark.parametrize("share", [0.01, 1 / 64, 0.03, 0.1, 0.25])
def test_places_take_little_more_than_their_entropy(share: float) -> None:
    codec, count = TopK(share), 1 << 17
    size = round(share * 4096)
    bound = entropy(4096, size) * count / 4096
    bits = 8 * len(codec.encode(draw("gauss", count), 0)) - 16 * size * count / 4096
    assert bound < bits < 1.03 * bound
    assert 8 * codec.most(count) - 16 * size * count / 4096 < 1.14 * bound
    assert codec.rate == pytest.approx((bits + 16 * size * count / 4096) / count, rel=0.005)


def test_places_in_clusters_take_no_more_than_the_most() -> None:
    for law in (slice(0, 123), slice(-123, None), slice(0, 4096, 34)):
        x = torch.zeros(4096)
        x[law] = 1
        codec = TopK(0.03)
        assert len(codec.encode(x, 0)) <= codec.most(4096)
        assert torch.equal(passed(codec, x) != 0, x.cumsum(0).le(123) & (x != 0))


@pytest.mark.parametrize(
    ("share", "law", "wanted"),
    [
        (1 / 64, "gauss", 0.346),
        (1 / 64, "even", 0.215),
        (1 / 64, "t3", 0.648),
        (0.03, "gauss", 0.441),
        (0.03, "even", 0.296),
        (0.03, "t3", 0.714),
        (0.1, "gauss", 0.663),
        (0.1, "even", 0.521),
        (0.1, "t3", 0.844),
    ],
)
def test_cosines_and_rates_of_the_table(share: float, law: str, wanted: float) -> None:
    x = draw(law, 1 << 20)
    data = TopK(share).encode(x, 0)
    # a sample with tails so heavy differs from the next one by as much
    allowed = 0.015 if law == "t3" else 0.01
    assert cosine(x, TopK(share).decode(data, x.shape, 0)) == pytest.approx(wanted, abs=allowed)
    assert 8 * len(data) / x.numel() == pytest.approx({1 / 64: 0.37, 0.03: 0.67, 0.1: 2.07}[share], abs=0.015)


@pytest.mark.parametrize(
    ("bits", "gauss", "t3"), [(16, 0.0018, 0.0018), (8, 0.0034, 0.0105), (4, 0.068, 0.126), (2, 0.127, 0.38)]
)
def test_errors_of_the_values_are_those_measured(bits: int, gauss: float, t3: float) -> None:
    for law, wanted in (("gauss", gauss), ("t3", t3)):
        x = draw(law, 1 << 18)
        exact = torch.zeros_like(x).reshape(-1, 4096)
        rows = x.reshape(-1, 4096)
        places = rows.abs().topk(123, dim=1).indices
        exact.scatter_(1, places, rows.gather(1, places))
        assert error(exact.reshape(-1), passed(TopK(0.03, bits=bits), x)) == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_zeros_and_the_ends_of_float32(codec: TopK) -> None:
    assert (passed(codec, torch.zeros(5000)).numpy().view(np.uint32) == 0).all()
    largest = torch.finfo(torch.float32).max
    for x in (draw("gauss", 5000).sign() * largest, torch.full((5000,), 1e-45), draw("gauss", 5000) * 1e-39):
        assert passed(codec, x).isfinite().all()


@pytest.mark.parametrize("codec", CODECS, ids=name)
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_bytes_from_anywhere_are_a_finite_tensor_or_a_value_error(codec: TopK, data: st.DataObject) -> None:
    codec = TopK(0.2, chunk=32, bits=codec.bits)
    bad = spoilt(data, codec.encode(draw("gauss", 100), 3), most=4)
    shape = data.draw(st.sampled_from([(100,), (5, 20), (99,), (128,), (0,), (2**40, 2**40), (-5, -20)]))
    decoded_or_refused(codec, bad, shape)


@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_what_no_encoder_makes_is_refused(codec: TopK) -> None:
    x = draw("gauss", 5000)
    good = codec.encode(x, 0)
    with pytest.raises(ValueError, match="bytes for 5000 elements, expected"):
        codec.decode(b"", (5000,), 0)
    with pytest.raises(ValueError, match="bytes for 5000 elements, expected"):
        codec.decode(good + bytes(5000), (5000,), 0)
    for bad in (good[:-1], good + b"\0", good[:-20] + b"\xff" * 20, good[:-1] + bytes([good[-1] | 0x80])):
        with pytest.raises(ValueError, match="places"):
            codec.decode(bad, (5000,), 0)
    with pytest.raises(ValueError, match="finite"):
        codec.decode(b"\x80\x7f" + good[2:], (5000,), 0)


def test_bad_input_is_refused() -> None:
    assert_takes_finite_float32_and_a_key(TopK(0.1))
    for arguments in ({"share": 0.0}, {"share": 1.1}, {"share": 0.1, "bits": 1}, {"share": 0.1, "chunk": 0}):
        with pytest.raises(ValueError, match=r"share|bits|chunk"):
            TopK(**arguments)


@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_every_machine_and_thread_makes_the_same_bits(codec: TopK) -> None:
    assert_same_bits_everywhere(codec, 10_000, DIGESTS[codec.bits])


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("law", ["gauss", "t3"])
def test_with_error_feedback_what_was_sent_follows_the_sum_of_updates(bits: int, law: str) -> None:
    codec = TopK(0.03, chunk=256, bits=bits)
    steady, residue = draw(law, 1024), torch.zeros(1024)
    summed, sent, plain = torch.zeros(3, 1024, dtype=torch.float64)
    lost = []
    for turn in range(400):
        x = steady + 0.3 * draw("gauss", 1024, seed=turn + 1)
        found = passed(codec, x + residue)
        # a contraction, whatever the residue has become: with exact values by 1 - 8 / 256 of the square at least
        assert (x + residue - found).norm() < 0.99 * (x + residue).norm()
        residue = x + residue - found
        summed, sent, plain = summed + x, sent + found, plain + passed(codec, x)
        lost.append(error(summed, sent))
    assert torch.allclose(summed - sent, residue.double(), rtol=0, atol=1e-3)
    # what is missing stops growing, so its share of the sum halves when the turns double; without feedback it stays
    assert lost[399] < 0.55 * lost[199]
    assert lost[399] < 0.05
    assert error(summed, plain) > 0.7
