"""Differences in units of the last place: exact, short, and either a tensor or a ValueError out of whatever comes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.compress.entropy import rans
from thinwire.compress.exact import ulp

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
DTYPES = list(INTEGERS)
# zero, the least and the largest denormal, the least normal, 1, the largest finite, infinity, quiet and signalling NaN
SPECIAL = {
    torch.bfloat16: (0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x7F7F, 0x7F80, 0x7FC0, 0x7F81, 0x7FFF),
    torch.float16: (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7C01, 0x7FFF),
    torch.float32: (
        *(0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x3F800000),
        *(0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF),
    ),
}


HEAD = 8  # bytes before the chunks, of a tensor of two dimensions below 128


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(INTEGERS[values.dtype])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def special(dtype: torch.dtype) -> Tensor:
    top = 8 * dtype.itemsize
    patterns = [p - (1 << top) if p >> (top - 1) else p for q in SPECIAL[dtype] for p in (q, q | 1 << (top - 1))]
    return torch.tensor(patterns, dtype=INTEGERS[dtype]).view(dtype)


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 0.02, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, spread, shape).astype(np.float32)).to(dtype)


def moved(old: Tensor, spread: float, seed: int = 1, rank: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    step = rng.normal(0, spread, old.shape)
    if rank:
        step = np.sign(rng.normal(size=(old.shape[0], rank)) @ rng.normal(size=(rank, old.shape[1]))) * np.abs(step)
    return (old.double() + torch.from_numpy(step)).to(old.dtype)


def round_trip(new: Tensor, old: Tensor | None) -> bytes:
    data = ulp.encode(new, old)
    found = ulp.decode(data, old, new.dtype, new.shape)
    assert same(found, new)
    assert found.is_contiguous()
    return data


def order0(new: Tensor, old: Tensor) -> float:
    """Bits of all k, by counting."""
    k = ulp.ordered(new).astype(np.int64).reshape(-1) - ulp.ordered(old).reshape(-1)
    _, counts = np.unique(k, return_counts=True)
    return -float(np.sum(counts * np.log2(counts / k.size)))


# Places


@pytest.mark.parametrize("dtype", DTYPES)
def test_places_are_in_the_order_of_the_numbers_and_lead_back(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        values = torch.cat([special(dtype), weights(5000, dtype=dtype)])
    else:
        values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    places = ulp.ordered(values)
    assert len(np.unique(places)) == len(np.unique(bits(values).numpy()))
    assert same(ulp.unordered(places, dtype), values)
    finite = torch.isfinite(values).numpy()
    in_order = values.double().numpy()[finite][np.argsort(places[finite])]
    assert np.all(np.diff(in_order) >= 0)
    minus_zero, zero = ulp.ordered(torch.tensor([-0.0, 0.0], dtype=dtype)).tolist()
    assert (minus_zero, zero) == (-1, 0)


def test_the_entropy_is_that_of_the_differences() -> None:
    old = weights(64, 64)
    new = moved(old, 1e-4)
    assert ulp.entropy(new, old) == pytest.approx(order0(new, old) / 4096)
    assert ulp.entropy(old, old) == 0
    assert ulp.entropy(old[:0], old[:0]) == 0


# The way there and back


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_special_pattern_becomes_every_other(dtype: torch.dtype) -> None:
    patterns = special(dtype)
    old, new = patterns.repeat(len(patterns)), patterns.repeat_interleave(len(patterns))
    round_trip(new, old)
    round_trip(new, None)
    # and among weights that make no exception of them
    many, other = weights(64, 50, dtype=dtype), moved(weights(64, 50, dtype=dtype), 1e-4)
    many[3, : len(patterns)], other[3, : len(patterns)] = patterns, patterns.flip(0)
    round_trip(other, many)
    round_trip(other, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_of_16_bits_survives(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    order = torch.from_numpy(np.random.default_rng(0).permutation(1 << 16))
    round_trip(every.view(dtype), every[order].view(dtype))
    round_trip(every.view(dtype), every.roll(1).view(dtype))
    round_trip(every.view(dtype), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-5, 1e-3, 1.0])
def test_displaced_weights_come_back(dtype: torch.dtype, spread: float) -> None:
    old = weights(48, 70, dtype=dtype)
    for rank in (0, 1, 3):
        round_trip(moved(old, spread, rank=rank), old)
    round_trip(-old, old)
    round_trip(torch.zeros_like(old), old)
    round_trip(old, torch.zeros_like(old))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (5, 1), (1, 5), (2, 3, 4, 5), (1, 2000), (40, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    old = weights(*shape, dtype=dtype)
    for new in (old, moved(old, 1e-4), weights(*shape, dtype=dtype, seed=3)):
        round_trip(new, old)
        round_trip(new, None)


def test_what_is_not_contiguous_comes_back_contiguous() -> None:
    old = weights(60, 40).T
    round_trip(moved(weights(60, 40), 1e-4).T, old)
    round_trip(moved(weights(60, 40), 1e-4).T, old.contiguous())
    round_trip(weights(60, 40)[::2, ::3], weights(60, 40)[1::2, ::3])
    round_trip(weights(60, 40).T, None)


@pytest.mark.parametrize("size", [255, 256, 257, 511, 512, 513, 1024])
@pytest.mark.parametrize("columns", [1, 16, 100, 256, 300])
def test_chunks_meet_without_a_gap(monkeypatch: pytest.MonkeyPatch, size: int, columns: int) -> None:
    monkeypatch.setattr(ulp, "CHUNK", 256)
    flat = weights(size)
    new = moved(flat, 1e-4)
    round_trip(new, flat)
    round_trip(new, None)
    rows = size // columns
    if rows:
        round_trip(new[: rows * columns].view(rows, columns), flat[: rows * columns].view(rows, columns))


def test_a_chunk_decodes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # the same rows make the same bytes, wherever in a tensor they are
    monkeypatch.setattr(ulp, "CHUNK", 40 * 32)
    old = weights(40, 32)
    new = moved(old, 1e-4)
    one = ulp.encode(new, old)
    both = ulp.encode(torch.cat([new, new]), torch.cat([old, old]))
    assert both.endswith(2 * one[HEAD:])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_patterns_come_back(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    top = 8 * dtype.itemsize - 1
    count = data.draw(st.integers(0, 80))
    patterns = st.lists(st.integers(-(1 << top), (1 << top) - 1), min_size=count, max_size=count)
    old, new = (torch.tensor(data.draw(patterns), dtype=INTEGERS[dtype]).view(dtype) for _ in range(2))
    round_trip(new, old)
    round_trip(new, None)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(1, 60), st.integers(1, 60), st.sampled_from(DTYPES))
def test_any_small_steps_come_back(seed: int, width: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    top = 8 * dtype.itemsize - 1
    width = min(width, top)
    old = rng.integers(-(1 << top), 1 << top, (rows, columns)) >> rng.integers(top)
    new = np.clip(old + rng.integers(-(1 << width), (1 << width) + 1, old.shape), -(1 << top), (1 << top) - 1)
    round_trip(*(torch.from_numpy(x).to(INTEGERS[dtype]).view(dtype) for x in (new, old)))


# Bytes


def test_a_tensor_that_did_not_change_costs_a_few_bytes() -> None:
    old = weights(600, 700)
    assert len(round_trip(old.clone(), old)) <= 12


def test_a_few_changes_cost_a_few_bytes() -> None:
    old = weights(600, 700)
    new = old.clone()
    for i in range(5):
        new[100 * i + 7, 93 * i + 11] *= 1.01
    assert 40 < len(round_trip(new, old)) < 120


def test_noise_is_sent_as_it_is() -> None:
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        patterns = torch.from_numpy(rng.integers(0, 256, 8192 * dtype.itemsize, dtype=np.uint8)).view(dtype)
        other = torch.from_numpy(rng.integers(0, 256, 8192 * dtype.itemsize, dtype=np.uint8)).view(dtype)
        for old in (None, other):
            assert len(round_trip(patterns, old)) <= 8192 * dtype.itemsize + 16


@pytest.mark.parametrize("spread", [1e-6, 1e-5, 1e-4])
def test_the_bytes_are_below_the_entropy_of_the_differences(spread: float) -> None:
    old = weights(512, 512)
    new = moved(old, spread)
    # the exponent of the old weight gives the size of k, so that even changes with no structure take less
    assert 8 * len(round_trip(new, old)) < 0.85 * order0(new, old)


def test_changes_of_low_rank_cost_less_than_changes_of_none() -> None:
    old = weights(512, 512)
    free = len(round_trip(moved(old, 1e-5), old))
    assert len(round_trip(moved(old, 1e-5, rank=1), old)) < 0.82 * free
    assert len(round_trip(moved(old, 1e-5, rank=2), old)) < 0.9 * free


def test_a_whole_tensor_costs_little_more_than_the_entropy_of_its_patterns() -> None:
    new = weights(512, 512)
    _, counts = np.unique(bits(new).numpy(), return_counts=True)
    least = -float(np.sum(counts * np.log2(counts / new.numel())))
    assert 8 * len(round_trip(new, None)) < 1.03 * least
    # weights of 16 bits in a wider type cost what they cost in 16 bits
    assert len(round_trip(new.float(), None)) < len(round_trip(new, None)) + 8


def test_the_format_is_what_it_was() -> None:
    # integers make the patterns, so that no generator and no rounding comes in between
    i = np.arange(96 * 80, dtype=np.int64)
    noise = i * 2654435761 >> 11 & 0xFFFF
    old = 0x3C80 + (noise % 384) - (noise >> 15 << 15)
    sign = np.where((i // 80 * 40503 >> 4 ^ i % 80 * 30011 >> 5) & 1, 1, -1)
    new = old + np.where(noise % 7 < 3, sign * (1 + noise % 3), 0)
    pair = [torch.from_numpy(x.reshape(96, 80)).to(torch.int16).view(torch.bfloat16) for x in (new, old)]
    digest = hashlib.sha256(round_trip(*pair) + round_trip(pair[0], None)).hexdigest()
    assert digest == "46237e95647032b2519948a31c2c6e57a49aaead8cffc38c80ca441434d33f70"


# What is wrong


def test_what_does_not_fit_is_refused() -> None:
    old = weights(20, 30)
    new = moved(old, 1e-4)
    data = ulp.encode(new, old)
    for given_old, dtype, shape in (
        (old, torch.bfloat16, (30, 20)),
        (old.view(30, 20), torch.bfloat16, (30, 20)),
        (old.view(-1), torch.bfloat16, (600,)),
        (old.half(), torch.float16, (20, 30)),
        (None, torch.bfloat16, (20, 30)),
        (None, torch.float16, (20, 30)),
        (old.double(), torch.float64, (20, 30)),
    ):
        with pytest.raises(ValueError, match=r"difference|differ"):
            ulp.decode(data, given_old, dtype, shape)
    with pytest.raises(ValueError, match="difference"):
        ulp.decode(ulp.encode(new, None), old, torch.bfloat16, (20, 30))
    with pytest.raises(ValueError, match="float64"):
        ulp.encode(new.double(), old.double())
    with pytest.raises(ValueError, match="cannot differ"):
        ulp.encode(new, old.half())
    with pytest.raises(ValueError, match="cannot differ"):
        ulp.encode(new, old.view(-1))


def test_another_old_tensor_is_noticed_and_none_is_written() -> None:
    old = weights(20, 30)
    before = old.clone()
    new = moved(old, 1e-4)
    other = old.clone()
    other[7, 7] *= -1
    for data in (ulp.encode(new, old), ulp.encode(old, old)):
        with pytest.raises(ValueError, match="difference"):
            ulp.decode(data, other, torch.bfloat16, (20, 30))
    found = ulp.decode(ulp.encode(old, old), old, torch.bfloat16, (20, 30))
    found.zero_()
    assert same(old, before)


def samples() -> list[tuple[bytes, Tensor | None, torch.dtype, tuple[int, ...]]]:
    """One of each form, small."""
    found = []
    for dtype in DTYPES:
        old = weights(24, 20, dtype=dtype)
        for new, base in (
            (moved(old, 1e-4), old),
            (moved(old, 1e-4, rank=1), old),
            (moved(old, 1e-3), None),
            (old.clone(), old),
            (moved(old, 3.0), old),
        ):
            found.append((ulp.encode(new, base), base, dtype, (24, 20)))
    return found


def reads(data: bytes, old: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    try:
        found = ulp.decode(data, old, dtype, shape)
    except ValueError:
        return False
    assert found.shape == shape
    assert found.dtype == dtype
    return True


def test_every_truncation_and_every_lengthening_is_refused() -> None:
    for data, *rest in samples():
        assert reads(data, *rest)
        assert not reads(data + b"\0", *rest)
        assert not reads(data + bytes(4), *rest)
        assert not any(reads(data[:n], *rest) for n in range(len(data)))


def test_flipped_bits_are_refused() -> None:
    rng, unread, tried = np.random.default_rng(0), 0, 0
    for data, *rest in samples():
        for place in rng.permutation(8 * len(data))[:400].tolist():
            flipped = bytearray(data)
            flipped[place >> 3] ^= 1 << (place & 7)
            # a few bits show nothing, such as those that fill the last word
            with contextlib.suppress(ValueError):
                assert same(ulp.decode(bytes(flipped), *rest), ulp.decode(data, *rest))
                unread += 1
            tried += 1
    assert unread < tried / 20


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 14), st.integers(0, 40), st.binary(max_size=200))
def test_a_head_before_any_bytes_is_a_tensor_or_refused(which: int, kept: int, tail: bytes) -> None:
    data, *rest = SAMPLES[which]
    reads(data[:kept] + tail, *rest)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=120), st.sampled_from(DTYPES))
def test_any_bytes_are_refused_or_a_tensor(data: bytes, dtype: torch.dtype) -> None:
    reads(data, weights(6, 20, dtype=dtype), dtype, (6, 20))
    reads(data, None, dtype, (6, 20))
    with contextlib.suppress(IndexError):
        reads(bytes([data[0] & 3 | ulp.MAGIC | 12]) + b"\2\6\24" + data[1:], weights(6, 20), torch.bfloat16, (6, 20))


SAMPLES = samples()


# The coder, by its definition


class Table:
    """One adaptive table in plain Python."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = list(counts)
        self.renew()

    def renew(self) -> None:
        if sum(self.counts) > rans.LIMIT:
            self.counts = [(n + 1) // 2 for n in self.counts]
        total, best = sum(self.counts), self.counts.index(max(self.counts))
        self.sizes = [1 + n * (65536 - 16) // total for n in self.counts]
        self.sizes[best] += 65536 - sum(self.sizes)
        self.left = min(2048, 2 + total // (4 * rans.STEP))

    def learn(self, symbol: int) -> None:
        self.counts[symbol] += rans.STEP
        self.left -= 1
        if self.left == 0:
            self.renew()

    def interval(self, symbol: int) -> tuple[int, int]:
        return sum(self.sizes[:symbol]), self.sizes[symbol]


def fresh(count: int) -> list[Table]:
    counts, _, _ = rans.tables(count - 2, 2)
    return [Table(row) for row in counts.tolist()]


def written(symbols: Sequence[tuple[int, int]], tables: list[Table], lanes: int) -> list[int]:
    """The words of (table, symbol) pairs, by the textbook."""
    intervals = []
    for c, s in symbols:
        intervals.append(tables[c].interval(s))
        tables[c].learn(s)
    states, words = [1 << 31] * lanes, []
    for i in reversed(range(len(intervals))):
        start, size = intervals[i]
        x = states[i % lanes]
        if x >= size << 47:
            words.append(x & 0xFFFFFFFF)
            x >>= 32
        states[i % lanes] = (x // size << 16) + x % size + start
    for x in reversed(states):
        words += [x >> 32, x & 0xFFFFFFFF]
    return words[::-1]


def drawn(count: int, tables: int, seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return [(int(c), int(min(15, rng.geometric(0.3 + 0.1 * c) - 1))) for c in rng.integers(tables, size=count)]


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 5, 3000])
def test_the_coder_is_the_textbooks(lanes: int, count: int) -> None:
    symbols = drawn(count, 5, count)
    expected = written(symbols, fresh(5), lanes)
    coded = np.array([16 * c + s for c, s in symbols], np.uint32)
    rans.model(coded, *rans.tables(3, 2))
    out = np.empty(count // 2 + 4 * lanes, np.uint32)
    words = out[rans.flush(coded, lanes, out) :]
    assert words.tolist() == expected
    states, word, found = rans.begin(words, lanes), 2 * lanes, []
    state = rans.tables(3, 2)
    for i, (c, _) in enumerate(symbols):
        s, word = rans.take(*state, c, words, states, i % lanes, word)
        found.append((c, s))
    assert found == symbols
    assert rans.ended(words, states, word)


def test_old_counts_fade() -> None:
    table, state = fresh(3)[2], rans.tables(1, 2)
    symbols = np.array([2 * 16 + (i >> 16 & 1) for i in range(1 << 17)], np.uint32)
    for s in (symbols & 15).tolist():
        table.learn(s)
    rans.model(symbols, *state)
    assert state[0][2].tolist() == table.counts
    assert sum(table.counts) < rans.STEP * (1 << 17)
