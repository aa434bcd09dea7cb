"""Lossless differences of weights in low precision: what travels is how many representable numbers lie between.

Both ends hold `old`. A bit pattern x has a place o(x) in the order of all patterns, and k = o(new) - o(old) is coded
under what both ends know: the exponent of the old weight, because |k| is about |change| / ulp(old), and a forecast of
the change. The changes that a few steps of training make to a matrix are close to a matrix of low rank in their signs.
The encoder finds rank <= RANK factors of those signs, rounds them to a few levels and sends them where that pays; the
sign and size of their product at a weight then give the sign of k, and how sure it is.

    tensor   head (version, form, dtype), dimensions, checksum of the new patterns, and chunks of whole rows
    chunk    its length and form: unchanged, raw, or coded
    coded    rank, scales, shifts; words of rANS (`rans`): factors, which rows change, a token each weight; plain bits
    token    k in cells of 2**shift about 0, |cell| <= 6, its sign turned to the forecast's; else beyond or sign changed
    beyond   |cell| - 7 below 15; else the exponent of the new weight in two symbols and its mantissa in plain bits

The shift grows as the old exponent falls, so that a cell stays small against the spread of k. Integers only: the
same bytes on every machine, given the same patterns.

Here are tensors and chunks; `tokens` writes and reads what is in a coded one, `forecast` finds and applies the factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.entropy.rans import LANES, flush, model, tables
from thinwire.compress.exact.ulp_forecast import RANK, factors, spread, thresholds, window
from thinwire.compress.exact.ulp_tokens import FLAT, SKEWED, tokens, tokens_whole, weights, weights_whole

CHUNK = 1 << 20
"""Weights in a chunk, which decodes on its own, at most."""
COLUMNS = 1024
"""Length of the rows into which what has no rows of a sensible length is cut."""
MAGIC = 0xC0

_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_SAME, _CHUNKS = 0, 1  # forms of a tensor
_UNCHANGED, _RAW, _CODED = 0, 1, 2  # forms of a chunk


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
        lowest = window(new, drop, mask, mantissa)
        head = bytes([_CODED, drop, lowest])
        symbols = np.empty(3 * size, np.uint32)
        n, at = tokens_whole(new, drop, mask, mantissa, lowest, symbols, plain)
    else:
        lowest, pivot = spread(old, new, drop, mask, mantissa)
        scales, lefts, right, mean = factors(old, new, columns)
        head = bytes([_CODED, drop, lowest, len(scales), *scales]) + _varint(pivot) + _varint(mean)
        # a weight has at most four symbols, a row one more
        symbols = np.empty(4 * size + -(-size // columns) + right.size + lefts.size, np.uint32)
        limits, shares = thresholds(mean), np.array(scales, np.int32)
        n, at = tokens(
            old, new, columns, drop, mask, mantissa, lowest, pivot, shares, lefts, right, limits, symbols, plain
        )
    model(symbols[:n], *tables(SKEWED, FLAT))
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
        limits, fresh = thresholds(mean), tables(SKEWED, FLAT)
        if old is None:
            good = weights_whole(new, drop, mask, mantissa, lowest, fresh, words, lanes, plain)
        else:
            good = weights(
                old, new, columns, drop, mask, mantissa, lowest, pivot, scales, limits, fresh, words, lanes, plain
            )
        if not good:
            raise ValueError("the difference does not decode")
    else:
        raise ValueError(f"the difference has a part of the unknown form {form}")


def _lanes(size: int) -> int:
    # a state costs 8 bytes, which shows in a small tensor
    return LANES if size >= 1 << 14 else 1
