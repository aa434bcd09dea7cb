"""Blocks: each code against the slow nearest level, sizes and errors as claimed, only tensors out of any bytes."""

from __future__ import annotations

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

from thinwire.compress.codecs.block_kernels import TINY, TRIALS
from thinwire.compress.codecs.blocks import CENTROIDS, Blocks
from thinwire.compress.entropy.packing import pack, unpack
from thinwire.streams import words

CODECS = [Blocks(8), Blocks(7), Blocks(5), Blocks(4), Blocks(3), Blocks(2), Blocks(1)]
RANDOM = [Blocks(bits, stochastic=True) for bits in (8, 6, 4, 3, 2)]
EVERY = CODECS + RANDOM
# of the bytes and of what they decode to: what a change of them orphans is every recorded frame
DIGESTS = {
    "8": "6088e11033640beb",
    "7": "40d1dea2bf33143a",
    "5": "ce34d4b41c3ba487",
    "4": "09a48915e9080622",
    "3": "0b814d729def2165",
    "2": "37422a51a88fff6b",
    "1": "190c28161433cbb7",
    "8r": "b934f408a1c1a129",
    "6r": "8fac7597c02885c7",
    "4r": "ad0fbb2b760e3a79",
    "3r": "04ef2da5a9ebfa8f",
    "2r": "9d28047ec71e4e5b",
}
SHAPES = [(0,), (1,), (7, 3), (128,), (129,), (2, 3, 5, 67)]


def name(codec: Blocks) -> str:
    return f"{codec.bits}{'r' if codec.stochastic else ''}"


def bfloat(code: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (code.astype(np.uint32) << 16).view(np.float32)


def levels(codec: Blocks) -> NDArray[np.float64]:
    """What the codes stand for by the docstring."""
    if codec.bits > 4:
        return np.arange(1 - 2.0 ** (codec.bits - 1), 2.0 ** (codec.bits - 1))
    if codec.stochastic:
        return np.linspace(-1, 1, 2**codec.bits) * (2**codec.bits - 1) / 2
    half = np.array([1.0] if codec.bits == 1 else np.float32(CENTROIDS[codec.bits]), np.float64)
    return np.concatenate([-half[::-1], half])


def read(codec: Blocks, data: bytes, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Each element's scale, and its code, read from the bytes the slow way."""
    blocks = -(-count // codec.block)
    scales = np.frombuffer(data[: 2 * blocks], "<u2")
    bits = np.unpackbits(np.frombuffer(data[2 * blocks :], np.uint8), bitorder="little")
    assert not bits[codec.bits * count :].any()
    codes = bits[: codec.bits * count].reshape(count, codec.bits).astype(np.int64) @ (1 << np.arange(codec.bits))
    return np.repeat(bfloat(scales).astype(np.float64), codec.block)[:count], codes


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y.double()).norm() / x.double().norm())


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_packed_codes_are_their_bits_in_a_row(bits: int, values: list[int]) -> None:
    codes = np.array(values, np.uint8) & np.uint8((1 << bits) - 1)
    rows = np.unpackbits(codes.reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    packed = pack(codes, bits)
    assert packed.tobytes() == np.packbits(rows.reshape(-1), bitorder="little").tobytes()
    assert unpack(packed, bits, codes.size).tolist() == codes.tolist()


@pytest.mark.parametrize("codec", EVERY, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoded_is_level_times_scale_and_the_size_is_the_stated_one(codec: Blocks, shape: tuple[int, ...]) -> None:
    x = draw("gauss", int(np.prod(shape))).reshape(shape) * 1e-5
    data = codec.encode(x, 5)
    assert len(data) == codec.size(x.numel()) == 2 * -(-x.numel() // 128) + -(-x.numel() * codec.bits // 8)
    scale, code = read(codec, data, x.numel())
    found = codec.decode(data, shape, 5)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    wanted = np.float32(levels(codec)[code]) * np.float32(scale)
    assert np.array_equal(found.numpy().reshape(-1), wanted)
    assert torch.equal(codec.decode(memoryview(bytearray(b"." + data))[1:], shape, 5), found)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("law", ["gauss", "even", "t3"])
@pytest.mark.parametrize("block", [8, 41, 128])
def test_each_code_is_the_nearest_level(codec: Blocks, law: str, block: int) -> None:
    codec = Blocks(codec.bits, block)
    x = draw(law, 1000).numpy().astype(np.float64)
    scale, code = read(codec, codec.encode(torch.from_numpy(x.astype(np.float32)), 0), x.size)
    distances = np.abs(x[:, None] - levels(codec) * scale[:, None])
    assert np.allclose(distances[np.arange(x.size), code], distances.min(1), rtol=0, atol=1e-6 * np.abs(x).max())


@pytest.mark.parametrize("law", ["gauss", "even", "t3"])
def test_the_scales_are_those_of_the_docstring(law: str) -> None:
    x = draw(law, 1280).numpy().reshape(10, 128).astype(np.float64)
    flat = torch.from_numpy(x.astype(np.float32)).reshape(-1)
    half_digit = 2.0**-8

    def scales(codec: Blocks) -> NDArray[np.float64]:
        return read(codec, codec.encode(flat, 3), flat.numel())[0].reshape(10, 128)[:, 0]

    for bits, top in ((8, 127), (7, 63), (5, 15)):
        assert np.allclose(scales(Blocks(bits)), np.abs(x).max(1) / top, rtol=half_digit)
    assert np.allclose(scales(Blocks(1)), np.abs(x).mean(1), rtol=half_digit)
    for codec in RANDOM:
        ratio = scales(codec) * levels(codec)[-1] / np.abs(x).max(1)
        assert (ratio >= 1).all()
        assert (ratio <= 1 + 2 * half_digit).all()
    for bits in (4, 3, 2):
        codec = Blocks(bits)
        every, best = levels(codec), np.full(10, -1.0)
        rms, top = np.sqrt((x**2).mean(1)), np.abs(x).max(1) / every[-1]
        wanted = np.empty(10)
        for trial in [*(rms * factor for factor in TRIALS), top]:
            q = every[np.abs(x[..., None] / trial[:, None, None] - every).argmin(-1)]
            explained = (x * q).sum(1) ** 2 / (q * q).sum(1)
            wanted = np.where(explained > best, (x * q).sum(1) / (q * q).sum(1), wanted)
            best = np.maximum(best, explained)
        assert np.allclose(scales(codec), wanted, rtol=half_digit)


def test_one_bit_has_the_least_error_of_all_scaled_signs() -> None:
    x = draw("t3", 128)
    scale, _ = read(Blocks(1), Blocks(1).encode(x, 0), 128)
    errors = [error(x, x.sign() * float(scale[0]) * factor) for factor in (0.97, 1.0, 1.03)]
    assert min(errors) == errors[1]


@pytest.mark.parametrize(
    ("bits", "stochastic", "law", "wanted"),
    [
        (8, False, "gauss", 0.0065),
        (4, False, "gauss", 0.089),
        (4, False, "even", 0.076),
        (4, False, "t3", 0.168),
        (3, False, "gauss", 0.179),
        (2, False, "gauss", 0.339),
        (2, False, "even", 0.250),
        (1, False, "gauss", 0.601),
        (8, True, "gauss", 0.0092),
        (4, True, "gauss", 0.155),
        (3, True, "gauss", 0.333),
        (2, True, "gauss", 0.780),
    ],
)
def test_relative_errors_are_those_measured(bits: int, stochastic: bool, law: str, wanted: float) -> None:
    x = draw(law, 1 << 17)
    assert error(x, passed(Blocks(bits, stochastic=stochastic), x)) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("law", "wanted"), [("gauss", 0.798), ("even", 0.866), ("t3", 0.632)])
def test_signs_have_the_cosine_of_the_table(law: str, wanted: float) -> None:
    x = draw(law, 1 << 20)
    # the table has one scale for all
    assert cosine(x, passed(Blocks(1, block=1 << 20), x)) == pytest.approx(wanted, abs=0.01)
    assert cosine(x, passed(Blocks(1), x)) > wanted - 0.001


@pytest.mark.parametrize("codec", RANDOM, ids=name)
def test_stochastic_rounding_takes_a_neighbour_and_has_no_bias(codec: Blocks) -> None:
    x = draw("t3", 300) * 1e-3
    keys = 4000 if codec.bits < 8 else 400
    total, squares = torch.zeros(300, dtype=torch.float64), torch.zeros(300, dtype=torch.float64)
    scale = torch.from_numpy(read(codec, codec.encode(x, 0), 300)[0])
    for key in range(keys):
        found = passed(codec, x, key).double()
        assert ((found - x.double()).abs() < scale * (1 + 1e-6)).all()
        total += found
        squares += found**2
    mean = total / keys
    deviation = (squares / keys - mean**2).clamp(min=0).sqrt() / keys**0.5
    # 300 elements: the largest of as many standard normals is below 4.5 but for once in 500 keys
    assert ((mean - x.double()).abs() <= 4.5 * deviation + 1e-6 * scale).all()


def test_stochastic_codes_are_those_of_the_stated_words() -> None:
    codec = Blocks(4, stochastic=True)
    x = draw("gauss", (1 << 16) + 77)
    scale, code = read(codec, codec.encode(x, 9), x.numel())
    draws = np.concatenate([words(9, [0], 1 << 15)[0], words(9, [1], 39)[0]]).view("<u4")[: x.numel()]
    wanted = np.floor(x.numpy().astype(np.float64) / scale + 7.5 + draws * 2.0**-32)
    assert np.array_equal(code, np.clip(wanted, 0, 15))


@pytest.mark.parametrize("codec", EVERY, ids=name)
def test_zeros_stay_zeros_beside_other_blocks(codec: Blocks) -> None:
    x = draw("gauss", 512)
    x[128:256], x[300:384] = 0, -0.0
    x[256:300] = TINY / 2
    found = passed(codec, x)
    assert (found[128:384].numpy().view(np.uint32) == 0).all()
    assert (found[:128] != 0).any()
    assert torch.equal(passed(Blocks(8), x)[:128] == 0, (x[:128].abs() < x[:128].abs().max() / 254))


@pytest.mark.parametrize("codec", [Blocks(8), Blocks(7), Blocks(6), Blocks(5), Blocks(1)], ids=name)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40))
def test_what_was_decoded_is_encoded_without_loss(codec: Blocks, values: list[float]) -> None:
    once = passed(Blocks(codec.bits, block=8), torch.tensor(values, dtype=torch.float32))
    assert torch.equal(passed(Blocks(codec.bits, block=8), once), once)


@pytest.mark.parametrize("codec", EVERY, ids=name)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40))
def test_any_finite_tensor_decodes_to_a_finite_one(codec: Blocks, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    found = passed(Blocks(codec.bits, block=8, stochastic=codec.stochastic), x)
    assert found.isfinite().all()
    largest = x.abs().max() if len(values) else torch.tensor(0.0)
    assert (found.abs() <= largest * 2.74).all() or largest > 1e38


@pytest.mark.parametrize("codec", EVERY, ids=name)
def test_the_largest_numbers_keep_their_size(codec: Blocks) -> None:
    x = draw("gauss", 128).sign() * torch.finfo(torch.float32).max
    found = passed(codec, x)
    assert torch.equal(found.sign(), x.sign())
    assert (found.abs() > 0.98 * x.abs()).all()


@pytest.mark.parametrize("codec", EVERY, ids=name)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_from_anywhere_are_a_finite_tensor_or_a_value_error(codec: Blocks, data: st.DataObject) -> None:
    codec = Blocks(codec.bits, block=8, stochastic=codec.stochastic)
    bad = spoilt(data, codec.encode(draw("gauss", 21), 3))
    decoded_or_refused(
        codec, bad, data.draw(st.sampled_from([(21,), (3, 7), (20,), (22,), (0,), (2**40, 2**40), (-3, -7)]))
    )


@pytest.mark.parametrize("codec", EVERY, ids=name)
def test_what_no_encoder_makes_is_refused(codec: Blocks) -> None:
    good = codec.encode(draw("gauss", 13), 0)
    for bad in (good[:-1], good + b"\0", b""):
        with pytest.raises(ValueError, match=f"bytes for 13 elements, expected {len(good)}"):
            codec.decode(bad, (13,), 0)
    for scale in (b"\x80\x7f", b"\xc0\x7f", b"\x80\xff", b"\x00\xbf", b"\x80\x80"):
        with pytest.raises(ValueError, match="scale"):
            codec.decode(scale + good[2:], (13,), 0)
    with pytest.raises(ValueError, match="negative side"):
        codec.decode(good, (-13,), 0)
    with pytest.raises(ValueError, match="code"):
        codec.decode(good[:-1] + b"\xff", (13,), 0)


def test_bad_input_is_refused() -> None:
    assert_takes_finite_float32_and_a_key(Blocks(8))
    for arguments in (
        {"bits": 0},
        {"bits": 9},
        {"bits": 2.5},
        {"bits": 8, "block": 0},
        {"bits": 1, "stochastic": True},
    ):
        with pytest.raises(ValueError, match=r"bits|block"):
            Blocks(**arguments)


def test_views_are_encoded_as_their_elements() -> None:
    x = draw("gauss", 600).reshape(20, 30)
    assert Blocks(4).encode(x.T, 0) == Blocks(4).encode(x.T.contiguous(), 0)
    assert Blocks(4).encode(x[3:], 0) == Blocks(4).encode(x[3:].clone(), 0)
    weight = torch.nn.Parameter(x)
    assert Blocks(4).encode(weight, 0) == Blocks(4).encode(x, 0)


def test_rates() -> None:
    assert [codec.rate for codec in CODECS] == [8.125, 7.125, 5.125, 4.125, 3.125, 2.125, 1.125]
    assert 8 * Blocks(2).size(1 << 20) == Blocks(2).rate * (1 << 20)


@pytest.mark.parametrize("codec", EVERY, ids=name)
def test_every_machine_and_thread_makes_the_same_bits(codec: Blocks) -> None:
    assert_same_bits_everywhere(codec, 5000, DIGESTS[name(codec)])


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("law", ["gauss", "t3"])
def test_with_error_feedback_what_was_sent_follows_the_sum_of_updates(codec: Blocks, law: str) -> None:
    steady, residue = draw(law, 1024), torch.zeros(1024)
    summed, sent, plain = torch.zeros(3, 1024, dtype=torch.float64)
    lost = []
    for turn in range(400):
        x = steady + 0.3 * draw("gauss", 1024, seed=turn + 1)
        found = passed(codec, x + residue)
        # a contraction, whatever the residue has become
        assert (x + residue - found).norm() < 0.99 * (x + residue).norm()
        residue = x + residue - found
        summed, sent, plain = summed + x, sent + found, plain + passed(codec, x)
        lost.append(error(summed, sent))
    assert torch.allclose(summed - sent, residue.double(), rtol=0, atol=1e-3)
    # what is missing stops growing, so its share of the sum halves when the turns double; without feedback it stays
    assert lost[399] < 0.65 * lost[199]
    assert lost[399] < 0.1 * error(summed, plain)
    if codec.bits == 1:
        assert error(summed, plain) > 0.4


@settings(deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4]),
    block=st.sampled_from([8, 24, 64, 100]),
    count=st.integers(0, 400),
    seed=st.integers(0, 1000),
    flip=st.integers(0, 10_000) | st.none(),
)
def test_the_largest_magnitude_is_known_without_decoding(
    bits: int, block: int, count: int, seed: int, flip: int | None
) -> None:
    """And so is whether the bytes are legal: the two refuse the same."""
    code = Blocks(bits, block)
    data = bytearray(code.encode(torch.randn(count, generator=torch.Generator().manual_seed(seed)), 0))
    if flip is not None and data:
        data[flip // 8 % len(data)] ^= 1 << flip % 8
    try:
        decoded = code.decode(bytes(data), (count,), 0)
    except ValueError:
        with pytest.raises(ValueError, match=r"a scale is|a bit"):
            code.largest(bytes(data), count)
        return
    assert float(decoded.abs().max() if count else 0) <= code.largest(bytes(data), count)
    if bits == 1 and count:
        assert float(decoded.abs().max()) == code.largest(bytes(data), count)
    slow = code.values(*code.split(bytes(data), count), (count,))
    assert torch.equal(decoded.view(torch.int32), slow.view(torch.int32))  # minus zero too


def test_bytes_of_another_length_have_no_largest_magnitude() -> None:
    with pytest.raises(ValueError, match=r"2 bytes for 9 elements"):
        Blocks(1, 8).largest(b"ab", 9)
