"""Lossless differences of weights in low precision: what travels is how many representable numbers lie between.

Both ends hold `old`. A bit pattern x has a place o(x) in the order of all patterns, and k = o(new) - o(old) is coded
under what both ends know: the exponent of the old weight, because |k| is about |change| / ulp(old), and a forecast of
the change. The changes that a few steps of training make to a matrix are close to a matrix of low rank in their signs.
The encoder finds rank <= RANK factors of those signs, rounds them to a few levels and sends them where that pays; the
sign and size of their product at a weight then tell the sign of k, and how sure it is.

    tensor   head (version, form, dtype), dimensions, checksum of the new patterns, and chunks of whole rows
    chunk    its length and form: unchanged, raw, or coded
    coded    rank, scales, shifts; words of rANS (`rans`): factors, which rows change, a token each weight; plain bits
    token    k in cells of 2**shift about 0, |cell| <= 6, its sign turned to the forecast's; else beyond or sign changed
    beyond   |cell| - 7 below 15; else the exponent of the new weight in two symbols and its mantissa in plain bits

The shift grows as the old exponent falls, so that a cell stays small against the spread of k. Integers only: the
same bytes on every machine, given the same patterns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.rans import (
    BITS64,
    LANES,
    LOW,
    MASK,
    STEP,
    SYMBOLS,
    begin,
    ended,
    flush,
    model,
    renew,
    tables,
    take,
)

CHUNK = 1 << 20
"""Weights in a chunk, which decodes on its own, at most."""
COLUMNS = 1024
"""Length of the rows into which what has no rows of a sensible length is cut."""
RANK = 8
"""Factors of a forecast, at most; the encoder sends as many as pay."""
SWEEPS, SAMPLED = 5, 1 << 16
"""How the encoder looks for them: times to and fro over rows with about so many changes, before once over all rows."""
JUDGED = 1 << 17
"""Weights that the encoder looks at to judge what pays."""
MAGIC = 0xC0

_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_WORD, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_SAME, _CHUNKS = 0, 1  # forms of a tensor
_UNCHANGED, _RAW, _CODED = 0, 1, 2  # forms of a chunk

# Tables. Of each exponent of the old weight (EXPONENTS of them) there is one for each certainty of the forecast.
EXPONENTS, LEVELS = 32, 8
_ROW = EXPONENTS * LEVELS
_SKEWED = _ROW + 2
_CROSSED = _SKEWED  # one for the upper half of the new exponent, and one below each upper half
_FAR = _CROSSED + 17
_BEYOND = _FAR + 17
_FACTORS = _BEYOND + EXPONENTS
_WINDOW = _FACTORS + 2 * RANK
_FLAT = _WINDOW + 1 - _SKEWED
# Tokens: 0, +1, -1, ... +6, -6 cells, then these.
_NEAR, _CROSS, _UP, _DOWN = 6, 13, 14, 15
_THRESHOLDS = (0, 3, 6, 9, 12, 16, 24)  # between the levels of a forecast, in eighths of its mean size
_STEPS = 3, 1  # of a factor per root mean square, as a fraction
_SIZES = np.array([0, 1, 2, 3, 4, 6, 9, 13, 18])
"""The size of each level of a factor, in steps: a few rows change far more than others. No encoder uses the last."""


def ordered(values: Tensor) -> NDArray[np.signedinteger]:
    """The place of each bit pattern in their order: int16 or int32 of the shape; bf16, fp16 or float32 in.

    Non-negative patterns keep their value, negative ones become -1 - magnitude: monotone, and -0 and NaN survive.
    """
    return _turned(_patterns(values)).reshape(values.shape)


def unordered(places: NDArray[np.signedinteger], dtype: torch.dtype) -> Tensor:
    """The inverse of `ordered`: a contiguous tensor of that dtype."""
    return torch.from_numpy(_turned(np.ascontiguousarray(places))).view(dtype)


def entropy(new: Tensor, old: Tensor) -> float:
    """The order-0 entropy of k, in bits a weight: what a coder without contexts cannot go below."""
    k = ordered(new).astype(np.int64) - ordered(old)
    _, counts = np.unique(k, return_counts=True)
    return -float(np.sum(counts * np.log2(counts / k.size))) / k.size if k.size else 0.0


def encode(new: Tensor, old: Tensor | None = None) -> bytes:
    """The difference of two tensors of one shape and dtype (bf16, fp16, float32), or without `old` all of `new`.

    ValueError where the two do not match or the dtype is another.
    """
    if new.dtype not in _CODES:
        raise ValueError(f"no difference in units of {new.dtype}, only of bfloat16, float16 and float32")
    if old is not None and (old.dtype != new.dtype or old.shape != new.shape):
        raise ValueError(f"{new.dtype} {list(new.shape)} cannot differ from {old.dtype} {list(old.shape)}")
    theirs, mine = _patterns(new), None if old is None else _patterns(old)
    head = [_varint(n) for n in (new.ndim, *new.shape)]
    same = mine is not None and np.array_equal(mine, theirs)
    form = (_SAME if same else _CHUNKS) | (0 if old is None else 2)
    parts = [bytes([MAGIC | form << 2 | _CODES[new.dtype]]), *head, _digest(theirs)]
    if not same:
        columns, step = _cut(new.shape)
        mantissa = _MANTISSA[new.dtype]
        for low in range(0, theirs.size, step):
            here = None if mine is None else mine[low : low + step]
            body = _encode_chunk(theirs[low : low + step], here, columns, mantissa)
            parts += [_varint(len(body)), body]
    return b"".join(parts)


def decode(data: bytes | memoryview, old: Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The exact inverse: a new contiguous tensor on the CPU; `old` stays as it is.

    ValueError for anything that `encode` would not have made of a tensor of that dtype and shape and this `old`.
    """
    shape = tuple(shape)
    if dtype not in _CODES:
        raise ValueError(f"no difference in units of {dtype}, only of bfloat16, float16 and float32")
    if old is not None and (old.dtype != dtype or tuple(old.shape) != shape):
        raise ValueError(f"{dtype} {list(shape)} cannot differ from {old.dtype} {list(old.shape)}")
    source = _Source(data)
    head = source.take(1)[0]
    if head & 0xF0 != MAGIC or head & 3 != _CODES[dtype] or bool(head & 8) != (old is not None):
        raise ValueError(f"not a difference of {dtype} " + ("to an old tensor" if old is not None else "to nothing"))
    if source.varint() != len(shape) or any(source.varint() != n for n in shape):
        raise ValueError(f"the difference is not of the shape {list(shape)}")
    digest = source.take(4)
    mine = None if old is None else _patterns(old)
    if not head & 4:
        if mine is None:
            raise ValueError("nothing cannot be unchanged")
        found = mine.copy()
    else:
        found = np.empty(math.prod(shape), np.int32 if dtype == torch.float32 else np.int16)
        columns, step = _cut(shape)
        for low in range(0, found.size, step):
            here = None if mine is None else mine[low : low + step]
            _decode_chunk(source.take(source.varint()), found[low : low + step], here, columns, _MANTISSA[dtype])
    source.end()
    if _digest(found) != digest:
        raise ValueError("the difference does not lead to the tensor that it was made from")
    return torch.from_numpy(found).view(dtype).reshape(shape)


def _patterns(values: Tensor) -> NDArray[np.signedinteger]:
    """The bit patterns, flat; of the tensor's own memory where that is contiguous and on the CPU."""
    flat: NDArray[np.signedinteger] = (
        values.detach().cpu().contiguous().reshape(-1).view(_INTEGERS[values.dtype]).numpy()
    )
    return flat


def _turned(patterns: NDArray[np.signedinteger]) -> NDArray[np.signedinteger]:
    # an arithmetic shift makes the sign a mask; turning twice is turning not at all
    top = 8 * patterns.itemsize - 1
    kind = patterns.dtype.type
    turned: NDArray[np.signedinteger] = patterns ^ ((patterns >> kind(top)) & kind((1 << top) - 1))
    return turned


def _digest(patterns: NDArray[np.signedinteger]) -> bytes:
    """Four bytes that show a wrong `old`, too."""
    little = patterns.astype(patterns.dtype.newbyteorder("<"), copy=False)
    return xxhash.xxh3_64_digest(little.data)[:4]


def _cut(shape: Sequence[int]) -> tuple[int, int]:
    """(columns, weights a chunk); chunks are of whole rows."""
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:]) if len(shape) > 1 else 0
    if not (rows > 1 and 8 <= columns <= min(1 << 16, CHUNK)):
        columns = min(COLUMNS, CHUNK)
    return columns, CHUNK // columns * columns


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class _Source:
    """Bytes, read once from the front; ValueError where they end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data).cast("B"), 0

    def take(self, count: int) -> memoryview:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise ValueError("the difference is cut off")
        self._at += count
        return part

    def varint(self) -> int:
        value = 0
        for place in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << place
            if byte < 128:
                return value
        raise ValueError("a number in the difference does not end")

    def rest(self) -> memoryview:
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError("the difference has bytes after its end")


def _encode_chunk(
    new: NDArray[np.signedinteger], old: NDArray[np.signedinteger] | None, columns: int, mantissa: int
) -> bytes:
    if old is not None and np.array_equal(old, new):
        return bytes([_UNCHANGED])
    size, lanes, magnitude = new.size, _lanes(new.size), 8 * new.itemsize - 1
    both = int(np.bitwise_or.reduce(new)) | (0 if old is None else int(np.bitwise_or.reduce(old)))
    drop = min(mantissa, (both & -both).bit_length() - 1) if both else mantissa
    mask, mantissa = (1 << magnitude - drop) - 1, mantissa - drop
    plain = np.zeros(size * (magnitude + 1) // 32 + 4, np.uint32)
    if old is None:
        lowest = _window(new, drop, mask, mantissa)
        head = bytes([_CODED, drop, lowest])
        symbols = np.empty(3 * size, np.uint32)
        n, at = _tokens_whole(new, drop, mask, mantissa, lowest, symbols, plain)
    else:
        lowest, pivot = _spread(old, new, drop, mask, mantissa)
        scales, lefts, right, mean = _factors(old, new, columns)
        head = bytes([_CODED, drop, lowest, len(scales), *scales]) + _varint(pivot) + _varint(mean)
        # a weight has at most four symbols, a row one more
        symbols = np.empty(4 * size + -(-size // columns) + right.size + lefts.size, np.uint32)
        limits, factors = _thresholds(mean), np.array(scales, np.int32)
        n, at = _tokens(
            old, new, columns, drop, mask, mantissa, lowest, pivot, factors, lefts, right, limits, symbols, plain
        )
    model(symbols[:n], *_tables())
    out = np.empty(n // 2 + 4 * lanes, np.uint32)
    words = out[flush(symbols[:n], lanes, out) :]
    body = head + _varint(words.size) + words.astype("<u4").tobytes() + plain[: (at + 31) >> 5].astype("<u4").tobytes()
    if len(body) <= new.nbytes:
        return body
    return bytes([_RAW]) + new.astype(new.dtype.newbyteorder("<")).tobytes()


def _decode_chunk(
    data: memoryview,
    new: NDArray[np.signedinteger],
    old: NDArray[np.signedinteger] | None,
    columns: int,
    mantissa: int,
) -> None:
    source = _Source(data)
    form = source.take(1)[0]
    if form == _UNCHANGED and old is not None:
        source.end()
        new[:] = old
    elif form == _RAW:
        new[:] = np.frombuffer(source.take(new.nbytes), new.dtype.newbyteorder("<"))
        source.end()
    elif form == _CODED:
        lanes, magnitude = _lanes(new.size), 8 * new.itemsize - 1
        drop = source.take(1)[0]
        if drop > mantissa:
            raise ValueError("the difference drops more bits than there are")
        mask, mantissa = (1 << magnitude - drop) - 1, mantissa - drop
        lowest = source.take(1)[0]
        rank, pivot, mean = 0, 0, 0
        scales = np.zeros(0, np.int32)
        if old is not None:
            rank = source.take(1)[0]
            if rank > RANK:
                raise ValueError(f"the difference has a forecast of rank {rank}, more than {RANK}")
            scales = np.frombuffer(source.take(rank), np.uint8).astype(np.int32)
            pivot, mean = source.varint(), source.varint()
            if max(pivot, mean) >> 24:
                raise ValueError("the difference has an impossible head")
        count = source.varint()
        if count < 2 * lanes:
            raise ValueError("the difference is cut off")
        words = np.frombuffer(source.take(4 * count), "<u4").astype(np.uint32)
        rest = source.rest()
        if len(rest) % 4:
            raise ValueError("the difference is cut off")
        plain = np.concatenate([np.frombuffer(rest, "<u4").astype(np.uint32), np.zeros(2, np.uint32)])
        if old is None:
            good = _weights_whole(new, drop, mask, mantissa, lowest, _tables(), words, lanes, plain)
        else:
            good = _weights(
                old,
                new,
                columns,
                drop,
                mask,
                mantissa,
                lowest,
                pivot,
                scales,
                _thresholds(mean),
                _tables(),
                words,
                lanes,
                plain,
            )
        if not good:
            raise ValueError("the difference does not decode")
    else:
        raise ValueError(f"the difference has a part of the unknown form {form}")


def _lanes(size: int) -> int:
    # a state costs 8 bytes, which shows in a small tensor
    return LANES if size >= 1 << 14 else 1


def _tables() -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.int32]]:
    return tables(_SKEWED, _FLAT)


def _thresholds(mean: int) -> NDArray[np.int32]:
    return np.array([t * mean >> 3 for t in _THRESHOLDS], np.int32)


def _spread(
    old: NDArray[np.signedinteger], new: NDArray[np.signedinteger], drop: int, mask: int, mantissa: int
) -> tuple[int, int]:
    """(lowest exponent with a table to itself, the exponent below which cells hold more than one pattern)."""
    counts, sums = _survey(old, new, drop, mask, mantissa)
    known = np.cumsum(counts)
    # where every sign changes nothing is counted
    lowest = min(255, int(np.searchsorted(known, max(1, int(known[-1]) >> 10))))
    votes: dict[int, int] = {}
    for exponent, (count, total) in enumerate(zip(counts.tolist(), sums.tolist(), strict=True)):
        shift = (total // max(count, 1)).bit_length() - 2
        # where it is as large as it can be, it does not tell how large it ought to be
        if count and 0 < shift < mantissa - 1:
            votes[exponent + shift] = votes.get(exponent + shift, 0) + count
    half, pivot = sum(votes.values()) // 2, 0
    for pivot in sorted(votes):
        half -= votes[pivot]
        if half < 0:
            break
    return lowest, pivot


def _window(new: NDArray[np.signedinteger], drop: int, mask: int, mantissa: int) -> int:
    """The first of the 15 exponents that hold most weights."""
    counts, _ = _survey(new, new, drop, mask, mantissa)
    return int(np.argmax(np.convolve(counts[:256], np.ones(15, np.int64))[14:256]))


def _factors(
    old: NDArray[np.signedinteger], new: NDArray[np.signedinteger], columns: int
) -> tuple[list[int], NDArray[np.int32], NDArray[np.int32], int]:
    """(scales, left levels [rows, rank], right levels [rank, columns], mean forecast's size); rank 0 if none pays."""
    rows = old.size // columns
    none: tuple[list[int], NDArray[np.int32], NDArray[np.int32], int] = (
        [],
        np.zeros((rows, 0), np.int32),
        np.zeros((0, columns), np.int32),
        0,
    )
    if rows * columns != old.size or min(rows, columns) < 16:
        return none
    signs, places, changed = _signs(old.reshape(rows, columns), new.reshape(rows, columns))
    if min(places.size, columns) < RANK or places.size + columns > changed:
        return none
    # Products of small integers in float32 are exact, in whatever order they are added: rows and columns are at most
    # 2**16, and the vectors stay below 128. Orthogonal iteration, with integers in between.
    seed = np.arange(RANK * columns, dtype=np.int64).reshape(RANK, columns)
    basis = ((seed * 2654435761 >> 13 & 127) - 63).astype(np.float32)
    some = signs[:: 1 + changed // SAMPLED]
    for _ in range(SWEEPS):
        basis = _straighten(_straighten(basis @ some.T) @ some)
    right, across = _levels(_straighten(basis @ signs.T) @ signs)
    product = across.astype(np.float32) @ signs.T
    left, along = _levels(product)
    product = product.astype(np.int64)
    weight = [
        (int(x @ y) << 32) // max(1, int(x @ x) * int(z @ z)) for x, y, z in zip(along, product, across, strict=True)
    ]
    scales = [max(0, 255 * w // max(1, *weight)) for w in weight]
    rank, mean = _worth(signs, changed, left, right, np.array(scales)[:, None] * along, across)
    if rank == 0:
        return none
    lefts = np.zeros((rows, rank), np.int32)
    lefts[places] = left[:rank].T
    return scales[:rank], lefts, right[:rank].astype(np.int32), mean


def _levels(products: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the level, -7 .. 7, with the nearest size; that size) of each element, in shares of its row's mean square."""
    vectors, (up, down) = products.astype(np.int64), _STEPS
    squares = [int(row @ row) // row.size for row in vectors]
    spreads = np.array([max(1, math.isqrt(square)) for square in squares], np.int64)[:, None]
    doubled = 2 * up * np.abs(vectors) // (down * spreads)
    levels = np.searchsorted(_SIZES[:7] + _SIZES[1:8], doubled, side="right")
    return np.sign(vectors) * levels, np.sign(vectors) * _SIZES[levels]


@njit(nogil=True, cache=True)
def _survey(old, new, drop, mask, mantissa):
    """Weights, and the sum of |k| where the sign stays, for each exponent of the old weight."""
    counts, sums = np.zeros(257, np.int64), np.zeros(257, np.int64)
    # a part is enough to tell, and an odd stride falls on many columns
    for i in range(0, old.size, 1 + old.size // JUDGED * 2):
        a, b = np.int64(old[i]) >> drop, np.int64(new[i]) >> drop
        if (a ^ b) >= 0:
            exponent = min((a & mask) >> mantissa, 256)
            counts[exponent] += 1
            sums[exponent] += abs(a - b)
    return counts, sums


@njit(nogil=True, cache=True)
def _signs(old, new):
    """(signs of k in the rows that change, float32 [rows, columns], which rows, how many signs are not 0)."""
    rows, columns = old.shape
    places, n = np.empty(rows, np.int64), 0
    for i in range(rows):
        for j in range(columns):
            if old[i, j] != new[i, j]:
                places[n] = i
                n += 1
                break
    signs, changed = np.empty((n, columns), np.float32), 0
    for r in range(n):
        i = places[r]
        for j in range(columns):
            a, b = np.int64(old[i, j]), np.int64(new[i, j])
            a, b = a ^ ((a >> 63) & 0x7FFFFFFF), b ^ ((b >> 63) & 0x7FFFFFFF)
            signs[r, j] = int(b > a) - int(b < a)
            changed += a != b
    return signs, places[:n], changed


@njit(nogil=True, cache=True)
def _straighten(products):
    """Rows of integers below 2**24 made orthogonal, each to those before it, to 14 bits; float32 integers below 128."""
    vectors, out = np.empty(products.shape, np.int64), np.empty(products.shape, np.float32)
    columns = products.shape[1]
    for c in range(products.shape[0]):
        peak, square = np.int64(1), np.int64(0)
        for j in range(columns):
            vectors[c, j] = np.int64(products[c, j])
            peak = max(peak, abs(vectors[c, j]))
        # divided by multiplying: a division an element is most of the time that this takes
        scale = (np.int64(1) << 38) // peak
        for j in range(columns):
            vectors[c, j] = vectors[c, j] * scale >> 24
        for p in range(c):
            dot, norm = np.int64(0), np.int64(1)
            for j in range(columns):
                dot += vectors[c, j] * vectors[p, j]
                norm += vectors[p, j] * vectors[p, j]
            part = (dot << 14) // norm
            for j in range(columns):
                vectors[c, j] -= part * vectors[p, j] >> 14
        for j in range(columns):
            square += vectors[c, j] * vectors[c, j]
        # by a power of two, to a root mean square of 32 to 64
        root = np.int64(1)
        while root * root * 1024 * columns <= square:
            root *= 2
        for j in range(columns):
            out[c, j] = min(max(2 * vectors[c, j] // root, -127), 127)
    return out


@njit(nogil=True, cache=True)
def _log2(n):
    """log2 of an integer >= 1, in 1 / 256, downward."""
    whole = 0
    while n >> (whole + 1):
        whole += 1
    x, found = (n << 20) >> whole if whole <= 40 else n >> (whole - 20), whole
    for _ in range(8):
        x = x * x >> 20
        found *= 2
        if x >> 21:
            x >>= 1
            found += 1
    return found


@njit(nogil=True, cache=True)
def _bits(counts):
    """What it takes to code symbols of these counts, in bits / 256."""
    total, bits = np.int64(0), np.int64(0)
    for n in counts:
        total += n
        if n:
            bits -= n * _log2(n)
    return bits + total * _log2(max(total, 1))


@njit(nogil=True, cache=True)
def _worth(signs, changed, left, right, along, across):
    """(the rank at which factors save the most bits of sign less their own, the mean size of its forecasts)."""
    rows, columns = signs.shape
    step = 1 + max(signs.size // JUDGED, changed // (JUDGED // 4))
    best, rank, mean, own = np.int64(0), 0, np.int64(0), np.int64(0)
    forecasts = np.zeros(((rows + step - 1) // step, columns), np.int64)
    for c in range(left.shape[0]):
        tally = np.zeros((2, 16), np.int64)
        for j in range(columns):
            tally[0, right[c, j] + 8] += 1
        for i in range(rows):
            tally[1, left[c, i] + 8] += 1
        own += _bits(tally[0]) + _bits(tally[1])
        total, seen = np.int64(0), np.int64(0)
        for i in range(forecasts.shape[0]):
            for j in range(columns):
                forecasts[i, j] += along[c, step * i] * across[c, j]
            for j in range(columns):
                count = np.int64(signs[step * i, j] != 0)
                total += count * abs(forecasts[i, j])
                seen += count
        size = 1 + total // (seen + 1)
        hits = np.zeros((16, 2), np.int64)
        for i in range(forecasts.shape[0]):
            for j in range(columns):
                sign = signs[step * i, j]
                if sign != 0:
                    forecast = forecasts[i, j]
                    hits[min(15, abs(forecast) * 4 // size), np.int64((forecast > 0) == (sign > 0))] += 1
        saved = seen << 8
        for level in range(16):
            saved -= _bits(hits[level])
        # it tells of the size of k, too
        saved = saved * step * 5 // 4 - own
        if saved > best:
            best, rank, mean = saved, c + 1, size
    return rank, mean


# The kernels see int64 only: a pattern less its `drop` lowest bits, which are 0 in all the chunk, has a sign bit above
# `mask`, and its exponent above `mantissa` bits. Their inner loops call nothing that takes an array: numba counts
# references there, and that takes ten times as long as the work.


@njit(nogil=True, cache=True)
def _zigzag(value):
    return 2 * value - 1 if value > 0 else -2 * value


@njit(nogil=True, cache=True)
def _unzigzag(token):
    return (token + 1) >> 1 if token & 1 else -(token >> 1)


@njit(nogil=True, cache=True)
def _sized(level):
    return _SIZES[level] if level >= 0 else -_SIZES[-level]


@njit(nogil=True, cache=True)
def _shift(exponent, pivot, mantissa):
    """log2 of the patterns in a cell: at most half a binade's worth, and the less the larger the weight."""
    return max(0, min(pivot - exponent, mantissa - 1))


@njit(nogil=True, cache=True)
def _foresee(old, drop, mask, mantissa, lowest, scaled, right, thresholds, total, out):
    """out[j] = 2 * table of the old weight j + whether its size is to shrink; total is for scratch."""
    t0, t1, t2, t3 = thresholds[0], thresholds[1], thresholds[2], thresholds[3]
    t4, t5, t6 = thresholds[4], thresholds[5], thresholds[6]
    total[:] = np.int32(0)
    for c in range(scaled.size):
        factor, levels = scaled[c], right[c]
        for j in range(old.size):
            total[j] += np.int32(factor * levels[j])
    # all of it in int32, or half the lanes of the vector unit stay empty
    shift, cut, first = np.int32(drop), np.int32(mask), np.int32(lowest)
    bits, none, last = np.int32(mantissa), np.int32(0), np.int32(EXPONENTS - 1)
    for j in range(old.size):
        x, a = total[j], np.int32(old[j])
        size = np.int32(max(x, np.int32(-x)))
        level = np.int32(size > t0) + np.int32(size > t1) + np.int32(size > t2) + np.int32(size > t3)
        level += np.int32(size > t4) + np.int32(size > t5) + np.int32(size > t6)
        exponent = np.int32(min(max(np.int32(((a >> shift) & cut) >> bits) - first, none), last))
        out[j] = np.int32(16 * exponent) + np.int32(2 * level) + np.int32((x ^ a) < 0)


@njit(nogil=True, cache=True)
def _tokens(old, new, columns, drop, mask, mantissa, lowest, pivot, scales, lefts, right, thresholds, symbols, plain):
    """Fills symbols with 16 * table + symbol, and plain with bits; (symbols, bits).

    lefts int32 [rows, rank] and right int32 [rank, columns] are levels; plain is zero before.
    """
    rank, n, at, sizes = scales.size, 0, 0, np.empty(right.shape, np.int32)
    scaled, total, where = np.zeros(rank, np.int32), np.zeros(columns, np.int32), np.zeros(columns, np.int32)
    for c in range(rank):
        for j in range(columns):
            symbols[n] = 16 * (_FACTORS + 2 * c) + _zigzag(right[c, j])
            sizes[c, j] = _sized(right[c, j])
            n += 1
    before = 1
    for row in range((old.size + columns - 1) // columns):
        low, high = row * columns, min(old.size, (row + 1) * columns)
        changed = 0
        for i in range(low, high):
            changed |= old[i] != new[i]
        symbols[n] = 16 * (_ROW + before) + changed
        n += 1
        before = changed
        if not changed:
            continue
        for c in range(rank):
            symbols[n] = 16 * (_FACTORS + 2 * c + 1) + _zigzag(lefts[row, c])
            n += 1
            scaled[c] = scales[c] * _sized(lefts[row, c])
        _foresee(old[low:high], drop, mask, mantissa, lowest, scaled, sizes, thresholds, total, where)
        for i in range(low, high):
            w = where[i - low]
            a, b = np.int64(old[i]) >> drop, np.int64(new[i]) >> drop
            table, fresh, value = w >> 1, 0, np.int64(0)
            bits = _shift((a & mask) >> mantissa, pivot, mantissa)
            if (a ^ b) < 0:
                symbols[n], fresh = 16 * table + _CROSS, _CROSSED
            else:
                # of two negative patterns the larger one is the smaller number; `where` knows of it
                k = (a - b if w & 1 else b - a) + ((1 << bits) >> 1)
                cell = k >> bits
                value = k & ((1 << bits) - 1)
                if abs(cell) <= _NEAR:
                    symbols[n] = 16 * table + _zigzag(cell)
                else:
                    symbols[n] = 16 * table + (_UP if cell > 0 else _DOWN)
                    n += 1
                    beyond = min(abs(cell) - _NEAR - 1, 15)
                    symbols[n] = 16 * (_BEYOND + table // LEVELS) + beyond
                    fresh = _FAR if beyond == 15 else 0
            n += 1
            if fresh:
                value, bits = b & mask, mantissa
                exponent = value >> mantissa
                symbols[n], symbols[n + 1] = 16 * fresh + (exponent >> 4), 16 * (fresh + 1) + exponent
                n += 2
            if bits:
                shifted = np.uint64(value & ((1 << bits) - 1)) << np.uint64(at & 31)
                plain[at >> 5] |= np.uint32(shifted & _WORD)
                plain[(at >> 5) + 1] |= np.uint32(shifted >> _32)
                at += bits
    return n, at


@njit(nogil=True, cache=True)
def _weights(old, new, columns, drop, mask, mantissa, lowest, pivot, scales, thresholds, model, words, lanes, plain):
    """The inverse: fills new. False where the bytes are no chunk; plain ends with two words of padding."""
    counts, starts, left = model
    states = begin(words, lanes)
    rank, n, at, word, lanes = scales.size, 0, 0, 2 * lanes, lanes - 1
    scaled, total, where = np.zeros(rank, np.int32), np.zeros(columns, np.int32), np.zeros(columns, np.int32)
    right = np.zeros((rank, columns), np.int32)
    for c in range(rank):
        for j in range(columns):
            s, word = take(counts, starts, left, _FACTORS + 2 * c, words, states, n & lanes, word)
            right[c, j] = _sized(_unzigzag(s))
            n += 1
    before = 1
    for row in range((old.size + columns - 1) // columns):
        low, high = row * columns, min(old.size, (row + 1) * columns)
        changed, word = take(counts, starts, left, _ROW + before, words, states, n & lanes, word)
        n += 1
        if changed > 1:
            return False
        before = changed
        if changed == 0:
            for i in range(low, high):
                new[i] = old[i]
            continue
        for c in range(rank):
            s, word = take(counts, starts, left, _FACTORS + 2 * c + 1, words, states, n & lanes, word)
            scaled[c] = scales[c] * _sized(_unzigzag(s))
            n += 1
        _foresee(old[low:high], drop, mask, mantissa, lowest, scaled, right, thresholds, total, where)
        for i in range(low, high):
            w = where[i - low]
            a = np.int64(old[i]) >> drop
            table, stage, cell, upper = np.uint32(w >> 1), 0, np.int64(0), np.int64(0)
            bits = _shift((a & mask) >> mantissa, pivot, mantissa)
            negative = a < 0
            # stage 0: a token; 1: how far beyond; 2 and 3: the halves of an exponent; 4: done with a new pattern
            while True:
                lane = np.uint32(n & lanes)
                x = states[lane]
                slot, u = np.uint32(x & MASK), np.uint32(0)
                if slot >= starts[table, 1]:
                    for t in range(1, SYMBOLS):
                        u += np.uint32(slot >= starts[table, t])
                start = starts[table, u]
                x = np.uint64(starts[table, u + np.uint32(1)] - start) * (x >> BITS64) + np.uint64(slot - start)
                if x < LOW:
                    x <<= _32
                    if word < words.size:
                        x |= np.uint64(words[word])
                    word += 1
                states[lane] = x
                counts[table, u] += np.uint32(STEP)
                left[table] -= 1
                if left[table] == 0:
                    renew(counts, starts, left, table)
                n += 1
                s = np.int64(u)
                if stage == 0:
                    if s < _CROSS:
                        cell = (s + 1) >> 1 if s & 1 else -(s >> 1)
                        break
                    if s == _CROSS:
                        negative = not negative
                        table, stage = np.uint32(_CROSSED), 2
                    else:
                        cell = np.int64(1 if s == _UP else -1)
                        table, stage = np.uint32(_BEYOND + (w >> 4)), 1
                elif stage == 1:
                    if s < 15:
                        cell *= s + _NEAR + 1
                        break
                    table, stage = np.uint32(_FAR), 2
                elif stage == 2:
                    upper = s
                    table, stage = np.uint32(np.int64(table) + 1 + s), 3
                else:
                    upper, stage, bits = 16 * upper + s, 4, mantissa
                    break
            value = np.int64(0)
            if bits:
                j = min(at >> 5, plain.size - 2)
                pair = np.uint64(plain[j]) | np.uint64(plain[j + 1]) << _32
                value = np.int64((pair >> np.uint64(at & 31)) & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)))
                at += bits
            if stage == 4:
                size = (upper << mantissa) | value
            else:
                k = (cell << bits) + value - ((1 << bits) >> 1)
                # `w` says of the two patterns as they are, the magnitude is the other way round in a negative one
                step = -k if w & 1 else k
                size = (a & mask) + step
            if size < 0 or size > mask:
                return False
            new[i] = (size - mask - 1 if negative else size) << drop
    return ended(words, states, word) and (at + 31) >> 5 == plain.size - 2


@njit(nogil=True, cache=True)
def _tokens_whole(new, drop, mask, mantissa, lowest, symbols, plain):
    """As `_tokens`, of patterns by themselves: the exponent is coded, sign and mantissa are plain."""
    n, at = 0, 0
    for i in range(new.size):
        b = np.int64(new[i]) >> drop
        exponent = (b & mask) >> mantissa
        token = exponent - lowest
        if 0 <= token < 15:
            symbols[n] = 16 * _WINDOW + token
        else:
            symbols[n], symbols[n + 1] = 16 * _WINDOW + 15, 16 * _FAR + (exponent >> 4)
            symbols[n + 2] = 16 * (_FAR + 1) + exponent
            n += 2
        n += 1
        value = (b & ((1 << mantissa) - 1)) << 1 | (b < 0)
        shifted = np.uint64(value) << np.uint64(at & 31)
        plain[at >> 5] |= np.uint32(shifted & _WORD)
        plain[(at >> 5) + 1] |= np.uint32(shifted >> _32)
        at += mantissa + 1
    return n, at


@njit(nogil=True, cache=True)
def _weights_whole(new, drop, mask, mantissa, lowest, model, words, lanes, plain):
    """The inverse of `_tokens_whole`, as `_weights`."""
    counts, starts, left = model
    states = begin(words, lanes)
    n, at, word, lanes, bits = 0, 0, 2 * lanes, lanes - 1, mantissa + 1
    for i in range(new.size):
        table, stage, exponent = np.uint32(_WINDOW), 0, np.int64(0)
        while True:
            lane = np.uint32(n & lanes)
            x = states[lane]
            slot, u = np.uint32(x & MASK), np.uint32(0)
            for t in range(1, SYMBOLS):
                u += np.uint32(slot >= starts[table, t])
            start = starts[table, u]
            x = np.uint64(starts[table, u + np.uint32(1)] - start) * (x >> BITS64) + np.uint64(slot - start)
            if x < LOW:
                x <<= _32
                if word < words.size:
                    x |= np.uint64(words[word])
                word += 1
            states[lane] = x
            counts[table, u] += np.uint32(STEP)
            left[table] -= 1
            if left[table] == 0:
                renew(counts, starts, left, table)
            n += 1
            s = np.int64(u)
            if stage == 0:
                if s < 15:
                    exponent = lowest + s
                    break
                table, stage = np.uint32(_FAR), 1
            elif stage == 1:
                exponent = 16 * s
                table, stage = np.uint32(_FAR + 1 + s), 2
            else:
                exponent += s
                break
        j = min(at >> 5, plain.size - 2)
        pair = np.uint64(plain[j]) | np.uint64(plain[j + 1]) << _32
        value = np.int64((pair >> np.uint64(at & 31)) & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)))
        at += bits
        size = (exponent << mantissa) | (value >> 1)
        if size > mask:
            return False
        new[i] = (size - mask - 1 if value & 1 else size) << drop
    return ended(words, states, word) and (at + 31) >> 5 == plain.size - 2
