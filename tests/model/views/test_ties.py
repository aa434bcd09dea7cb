"""The map of the tied view against plain numpy: its law, both passes to the bit, and what is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from thinwire.model.views.ties import CHUNK, PARTS, Ties
from thinwire.model.views.ties_cpu import STEP, TILE
from thinwire.perturb.philox import philox4x32
from thinwire.streams import words

KEY, STREAM = 0xFEDCBA9876543210, 2**40 + 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (
    0,
    1,
    31,
    33,
    *(n * size + more for n in (4, 8) for size in (STEP, TILE) for more in (-1, 0, 1)),
    1001,
    24 * TILE + 77,
)
NUMBERS = (1, 7, 32_768, 65_536, 115_200)
any_size = st.integers(0, 300) | st.integers(0, 4 * TILE)
any_numbers = (
    st.integers(1, 100) | st.sampled_from((*NUMBERS, *(2**power for power in range(25)))) | st.integers(1, 2**24)
)
any_word = st.integers(0, 2**64 - 1)


def mapped(key: int, stream: int, count: int, numbers: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The law, from the plain generator."""
    halves = numbers in {2**power for power in range(16)}
    counter = np.zeros((count // 4 + 1, 4), np.uint32)
    counter[:, 0], counter[:, 2], counter[:, 3] = np.arange(len(counter)), stream & 0xFFFFFFFF, stream >> 32
    drawn = philox4x32(counter, [key & 0xFFFFFFFF, key >> 32]).reshape(-1)
    if halves:
        drawn = np.stack([drawn % 2**16, drawn // 2**16], axis=1).reshape(-1)
    drawn = drawn[:count]
    index = (drawn.astype(np.uint64) >> np.uint64(1)) * np.uint64(numbers) >> np.uint64(15 if halves else 31)
    return index.astype(np.int64), np.where(drawn % 2 == 0, 1, -1).astype(np.float32)


def values(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ordinary numbers, some of them tiny, and zeros of both signs."""
    rng = np.random.default_rng(seed)
    found = (rng.standard_normal(count) * 10.0 ** rng.choice([0, -2, -39], count)).astype(np.float32)
    found[::17], found[::19] = -0.0, 0.0
    return torch.from_numpy(found).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def spread_plainly(ties: Ties, theta: Tensor, stream: int, start: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    index, sign = mapped(ties.key, stream, start.numel(), ties.numbers)
    moved = np.float32(scale) * sign * theta.numpy()[index]
    return torch.from_numpy(start.float().numpy().reshape(-1) + moved).to(dtype).reshape(start.shape)


def collect_plainly(ties: Ties, gradient: Tensor, stream: int) -> NDArray[np.float64]:
    index, sign = mapped(ties.key, stream, gradient.numel(), ties.numbers)
    signed = sign.astype(np.float64) * gradient.double().numpy().reshape(-1)
    return np.bincount(index, weights=signed, minlength=ties.numbers)


@pytest.mark.parametrize("numbers", [*NUMBERS, 2**24])
@pytest.mark.parametrize("count", SIZES)
def test_the_map_is_the_law(count: int, numbers: int) -> None:
    index, sign = Ties(KEY, numbers).signed(STREAM, count)
    expected_index, expected_sign = mapped(KEY, STREAM, count, numbers)
    assert (index.dtype, sign.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(sign, expected_sign)


@pytest.mark.parametrize("numbers", [1, 2, 3, 1024, 32_767, 32_768, 32_769, 65_536, 115_200])
def test_the_map_is_of_the_words_of_a_stream(numbers: int) -> None:
    """Powers of two up to 2^15 take 16 bits an entry, from the lower end of each word; the others take 32."""
    width = 16 if numbers in (1, 2, 1024, 32_768) else 32
    drawn = [
        int(word) >> shift & (1 << width) - 1 for word in words(KEY, [STREAM], 51)[0] for shift in range(0, 64, width)
    ]
    index, sign = Ties(KEY, numbers).signed(STREAM, 101)
    assert index.tolist() == [((word >> 1) * numbers) >> (width - 1) for word in drawn[:101]]
    assert sign.tolist() == [-1 if word & 1 else 1 for word in drawn[:101]]


@pytest.mark.parametrize(
    ("numbers", "first", "digest"),
    [
        (
            32_768,
            [27045, 24028, 10382, 7814, 20599, 7372, 1730, 4935],
            "2cd2ef8987dae621f49449ce019809322426b7412c635d05682646fd055ee46e",
        ),
        (
            115_200,
            [84474, 27473, 25918, 17349, 47379, 114029, 68642, 2657],
            "b4d70e67c3266e4d3aa1467c791ff44613a938cc5161d242dcebbbf06f26c3fa",
        ),
    ],
)
def test_golden_maps_never_change(numbers: int, first: list[int], digest: str) -> None:
    """A change of any of these orphans every recorded run."""
    index, sign = Ties(0x0123456789ABCDEF, numbers).signed(42, 100_000)
    assert index[:8].tolist() == first
    assert hashlib.sha256(index.astype("<i4").tobytes() + sign.astype("<f4").tobytes()).hexdigest() == digest


@pytest.mark.parametrize("numbers", [1, 7, 8, 1000, 1024, 4096])
def test_indices_are_uniform_and_signs_balanced(numbers: int) -> None:
    count = 1 << 18
    index, sign = Ties(KEY, numbers).signed(3, count)
    assert (index.min(), index.max()) == (0, numbers - 1)
    mean = count / (2 * numbers)
    for one in (1, -1):  # chi-square of each sign's indices, so of both together; four standard deviations
        chi = float(np.square(np.bincount(index[sign == one], minlength=numbers) - mean).sum() / mean)
        assert abs(chi - numbers) < 4 * (2 * numbers) ** 0.5 + 4
    assert abs(sign.mean(dtype=np.float64)) < 4 / count**0.5


def test_streams_and_keys_are_apart() -> None:
    count, numbers = 1 << 16, 256
    index, sign = Ties(5, numbers).signed(3, count)
    for key, stream in ((5, 4), (5, 3 + 2**32), (6, 3), (5 + 2**32, 3)):
        other, others = Ties(key, numbers).signed(stream, count)
        assert abs(np.mean(index == other) - 1 / numbers) < 4 / (numbers * count) ** 0.5
        assert abs(np.mean(sign * others)) < 4 / count**0.5


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_spread_equals_plain_numpy_to_the_bit(dtype: torch.dtype, count: int, numbers: int) -> None:
    ties, theta, start = Ties(KEY, numbers), values(numbers, 1), values(count, 2, dtype)
    expected = spread_plainly(ties, theta, STREAM, start, dtype, 0.3)
    kept, out = start.clone(), torch.full_like(start, torch.nan)
    ties.spread(theta, STREAM, start, out, 0.3)
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(start), bits(kept))
    ties.spread(theta, STREAM, start, start, 0.3)
    assert torch.equal(bits(start), bits(expected))


@settings(deadline=None, max_examples=60)
@given(
    key=any_word,
    stream=any_word,
    count=any_size,
    numbers=any_numbers,
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    scale=st.floats(-4, 4, width=32),
)
def test_any_size_is_spread_to_the_bit(
    key: int, stream: int, count: int, numbers: int, dtypes: tuple[torch.dtype, torch.dtype], scale: float
) -> None:
    ties, theta, start = Ties(key, numbers), values(numbers, 1), values(count, 2, dtypes[0])
    out = torch.empty(count, dtype=dtypes[1])
    ties.spread(theta, stream, start, out, scale)
    assert torch.equal(bits(out), bits(spread_plainly(ties, theta, stream, start, dtypes[1], scale)))


def test_every_bfloat16_is_rounded_as_torch_rounds() -> None:
    """All patterns that are numbers or infinite, moved by halves of a last place: ties, carries, overflow."""
    start = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    start = start[~start.isnan()]
    ties = Ties(KEY, 1)
    for size in (0.0, 2.0**-9, 2.0**-8, 3 * 2.0**-9, 1.0, 2.0**119, 2.0**-134, 2.0**-149):
        theta, out = torch.tensor([size]), torch.empty_like(start)
        ties.spread(theta, 1, start, out)
        assert torch.equal(bits(out), bits(spread_plainly(ties, theta, 1, start, torch.bfloat16, 1.0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_none(dtype: torch.dtype) -> None:
    patterns = torch.tensor([0x7FFF, 0x7FC1, -1, 0x7F81]) if dtype == torch.bfloat16 else torch.full((4,), torch.nan)
    start = patterns.to(torch.int16).view(dtype) if dtype == torch.bfloat16 else patterns.to(dtype)
    Ties(KEY, 3).spread(torch.ones(3), 0, start, start)
    assert start.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_parameters_and_buffers_from_files(dtype: torch.dtype, tmp_path) -> None:  # type: ignore[no-untyped-def]
    ties, theta = Ties(KEY, 50), values(50, 1)
    start = values(6 * 35, 2, dtype).reshape(6, 5, 7)
    (tmp_path / "start").write_bytes(bits(start).numpy().tobytes())
    mapped_start = torch.from_file(str(tmp_path / "start"), size=start.numel(), dtype=dtype).reshape(start.shape)
    weight = torch.nn.Parameter(torch.empty_like(start))
    ties.spread(theta.requires_grad_(), 9, mapped_start, weight)
    assert torch.equal(bits(weight.detach()), bits(spread_plainly(ties, theta.detach(), 9, start, dtype, 1.0)))
    single = start.flatten()[0].clone()
    ties.spread(theta, 9, single, single)
    assert torch.equal(bits(single), bits(weight.detach())[0, 0, 0])


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_collected_equals_plain_numpy(dtype: torch.dtype, count: int, numbers: int) -> None:
    """One part, so that even the order of the sums is that of the entries."""
    ties, gradient, into = Ties(KEY, numbers), values(count, 3, dtype), values(numbers, 4)
    if count < 16 * numbers:
        expected = (into.double().numpy() + 0.7 * collect_plainly(ties, gradient, STREAM)).astype(np.float32)
        ties.collect(gradient, STREAM, into, 0.7)
        found = into.numpy() + np.float32(0)  # -0 that nobody follows may stay so
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@settings(deadline=None, max_examples=60)
@given(
    key=any_word,
    stream=any_word,
    count=any_size | st.integers(0, 300_000),
    numbers=any_numbers,
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from((1.0, -0.3, 3.0, 0.0)),
)
def test_any_size_is_collected(
    key: int, stream: int, count: int, numbers: int, dtype: torch.dtype, scale: float
) -> None:
    ties, gradient, into = Ties(key, numbers), values(count, 3, dtype), torch.zeros(numbers)
    ties.collect(gradient, stream, into, scale)
    expected = scale * collect_plainly(ties, gradient, stream)
    np.testing.assert_allclose(into.numpy(), expected, rtol=1e-6, atol=1e-6 * abs(expected).max(initial=0))


@pytest.mark.parametrize(
    ("count", "numbers"), [(12 * CHUNK + 1234, 115_200), (1_000_001, 7), (1_200_003, 32_768), (5, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, count: int, numbers: int) -> None:
    ties, theta, weight = Ties(KEY, numbers), values(numbers, 1), values(count, 2, dtype)
    expected = spread_plainly(ties, theta, STREAM, weight, dtype, 1.0)
    collected = []
    for threads in (1, 2, 4, None):
        out, into = torch.empty_like(weight), values(numbers, 4)
        ties.spread(theta, STREAM, weight, out, threads=threads)
        assert torch.equal(bits(out), bits(expected))
        ties.collect(weight, STREAM, into, threads=threads)
        collected.append(into)
    assert all(torch.equal(bits(into), bits(collected[0])) for into in collected)
    exact = values(numbers, 4).double().numpy() + collect_plainly(ties, weight, STREAM)
    np.testing.assert_allclose(collected[0].numpy(), exact, rtol=1e-6, atol=1e-6 * abs(exact).max())


def test_parts_are_as_many_as_pay() -> None:
    """A part of 8 d entries or more; sums of whole numbers show that each entry is counted once."""
    for count in (8 * 7 - 1, 8 * 7, 2 * 8 * 7 + 3, 8 * 7 * PARTS, 8 * 7 * PARTS * 3 + 1):
        ties, into = Ties(KEY, 7), torch.zeros(7)
        ties.collect(torch.ones(count), 2, into)
        np.testing.assert_array_equal(into.numpy(), collect_plainly(ties, torch.ones(count), 2))


@pytest.mark.parametrize("numbers", NUMBERS)
def test_what_is_collected_is_the_adjoint_of_what_is_spread(numbers: int) -> None:
    ties, count = Ties(KEY, numbers), 3 * TILE + 77
    theta, gradient = values(numbers, 1), values(count, 2)
    out, into = torch.empty(count), torch.zeros(numbers)
    ties.spread(theta, STREAM, torch.zeros(count), out, 0.5)
    ties.collect(gradient, STREAM, into, 0.5)
    one, other = float(out.double() @ gradient.double()), float(theta.double() @ into.double())
    assert one == pytest.approx(other, rel=1e-6, abs=1e-6 * float(out.norm() * gradient.norm()))


def test_what_is_collected_is_the_gradient_of_what_is_spread() -> None:
    ties, count = Ties(KEY, 40), 301
    index, sign = ties.signed(1, count)
    theta, target = values(40, 1).requires_grad_(), values(count, 2)
    loss = (torch.from_numpy(sign) * theta[torch.from_numpy(index).long()] * 0.5 - target).square().sum()
    (expected,) = torch.autograd.grad(loss, theta)
    spread, into = torch.empty(count), torch.zeros(40)
    ties.spread(theta, 1, torch.zeros(count), spread, 0.5)
    ties.collect(2 * (spread - target), 1, into, 0.5)
    torch.testing.assert_close(into, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_are_counted_row_by_row_however_they_lie(dtype: torch.dtype) -> None:
    ties, theta, start = Ties(KEY, 50), values(50, 1), values(35, 2, dtype).reshape(5, 7)
    expected = spread_plainly(ties, theta, 9, start, dtype, 1.0)
    turned, out, into, other = (
        start.t().contiguous().t(),
        torch.empty(7, 5, dtype=dtype),
        torch.zeros(50),
        torch.zeros(50),
    )
    assert not turned.is_contiguous()
    ties.spread(theta, 9, turned, out.t())
    assert torch.equal(bits(out.t().contiguous()), bits(expected))
    ties.spread(theta, 9, turned, turned)
    assert torch.equal(bits(turned.contiguous()), bits(expected))
    ties.collect(turned, 9, into)
    ties.collect(expected, 9, other)
    assert torch.equal(into, other)


def test_what_does_not_fit_is_refused() -> None:
    ties, theta, weight = Ties(1, 4), torch.zeros(4), torch.zeros(3, 2)
    for numbers in (0, -1, 2**24 + 1):
        with pytest.raises(ValueError, match="numbers are not 1 to 16777216"):
            Ties(1, numbers)
    for key in (-1, 2**64):
        with pytest.raises(ValueError, match="has not 64 bits"):
            Ties(key, 4)
    for stream in (-1, 2**64):
        with pytest.raises(ValueError, match="has not 64 bits"):
            ties.spread(theta, stream, weight, weight)
    with pytest.raises(ValueError, match="more than"):
        ties.signed(0, 2**34 + 1)
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"numbers are float32 \[4\]"):
            ties.spread(wrong, 0, weight, weight)
        with pytest.raises(ValueError, match=r"numbers are float32 \[4\]"):
            ties.collect(weight, 0, wrong)
    for wrong in (weight.double(), torch.zeros(3, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="a tensor is of float32"):
            ties.spread(theta, 0, wrong, weight)
        with pytest.raises(ValueError, match="a tensor is of float32"):
            ties.spread(theta, 0, weight, wrong)
        with pytest.raises(ValueError, match="a tensor is of float32"):
            ties.collect(wrong, 0, theta)
    with pytest.raises(ValueError, match=r"start is \(3, 2\) but out is \(6,\)"):
        ties.spread(theta, 0, weight, torch.zeros(6))
