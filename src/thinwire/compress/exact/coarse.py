"""Weights that `blocks.Blocks` has rounded, in fewer bytes, and in very few where both ends have held older ones.

The old weights, exact or decoded from another such code, have codes under the scales of the new ones, too. They
predict the new codes; what is left is the number of levels between the two, which is mostly 0, and is coded by rANS.
Without old weights it is the distance to the middle level.

    head     shift, bytes of the scales, bytes of the tokens
    scales   their differences to those of the old weights, packed as `integers`
    tokens   z >> shift for the distance z = 0, -1, 1, -2, ..., and 15 where that is 15 or more; coded as `counted`
    plain    the low bits of each z, as many as the shift; then, if that is below 4, a byte for each z of token 15
"""

from __future__ import annotations

import struct

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks, Codes, Scales
from thinwire.compress.entropy import integers, static
from thinwire.compress.entropy.packing import flatten, octets, pack, unpack

_HEAD = struct.Struct("<BII")
_BEYOND = 15
_SHIFTS = range(5)  # by 4, each distance below 256 has a token


@njit(nogil=True, cache=True)
def _nearest(x, scales, block, levels, codes):
    """The code of the level, times the scale of the block, that is nearest to each x; the middle one for scale 0."""
    middle, even = levels.size // 2, levels.size % 2 == 1
    low = np.float32(-middle)
    for b in range(scales.size):
        part, code, scale = x[b * block : (b + 1) * block], codes[b * block : (b + 1) * block], scales[b]
        if scale == 0:
            code[:] = middle
            continue
        for i in range(part.size):
            level = part[i] / scale
            if even:
                code[i] = np.uint8(np.int32(np.rint(min(max(level, low), -low))) + middle)
            else:
                below = 0
                for j in range(levels.size - 1):
                    below += level >= (levels[j] + levels[j + 1]) / np.float32(2)
                code[i] = below


@njit(nogil=True, cache=True)
def _distances(codes, expected, levels, out):
    """How far each code is from the predicted one, the shorter way round: 0, -1, 1, -2 become 0, 1, 2, 3."""
    for i in range(codes.size):
        up = (np.int32(codes[i]) - np.int32(expected[i])) % levels
        out[i] = 2 * up if 2 * up < levels else 2 * (levels - up) - 1


@njit(nogil=True, cache=True)
def _move(codes, distances, levels):
    """From the predicted codes to the new ones, in place: the inverse of `_distances`."""
    for i in range(codes.size):
        z = np.int32(distances[i])
        code = np.int32(codes[i]) + ((z >> 1) ^ -(z & 1))
        code += levels if code < 0 else 0
        codes[i] = code - levels if code >= levels else code


def encode(scales: Scales, codes: Codes, code: Blocks, old: Tensor | None) -> bytes:
    """What the code has rounded weights to, in few bytes.

    old: as many weights, of any float dtype, on the CPU, finite (ValueError).
    """
    distances = np.empty(codes.size, np.uint8)
    _distances(codes, predicted(old, scales, code, codes.size), code.levels.size, distances)
    shift = _best(distances)
    tokens = np.minimum(distances >> np.uint8(shift), _BEYOND)
    moves = integers.pack(scales.astype(np.int64) - _scales(old, code, scales.size))
    drawn = static.encode(tokens)
    plain = pack(distances & np.uint8((1 << shift) - 1), shift).tobytes() if shift else b""
    beyond = distances[tokens == _BEYOND].tobytes() if shift < _SHIFTS[-1] else b""
    return _HEAD.pack(shift, len(moves), len(drawn)) + moves + drawn + plain + beyond


def decode(data: bytes | memoryview, code: Blocks, old: Tensor | None, count: int) -> tuple[Scales, Codes]:
    """The inverse, given the same old weights; ValueError for bytes that `encode` would not have made."""
    body = octets(data)
    if body.size < _HEAD.size:
        raise ValueError(f"{body.size} bytes are no coarse weights")
    shift, *lengths = _HEAD.unpack(body[: _HEAD.size].tobytes())
    starts = np.cumsum([_HEAD.size, *lengths, -(-count * shift // 8)])
    if shift not in _SHIFTS or starts[-1] > body.size:
        raise ValueError("coarse weights are shorter than their head announces")
    moves, drawn, plain, beyond = np.split(body, starts)[1:]
    distances = static.decode(drawn.data, count)
    far = distances == _BEYOND if shift < _SHIFTS[-1] else np.zeros(0, np.bool_)
    if beyond.size != np.count_nonzero(far):
        raise ValueError("coarse weights have another length than that of their tokens")
    if shift:
        distances <<= np.uint8(shift)
        distances |= unpack(plain, shift, count)
    if beyond.size:
        distances[far] = beyond
    if int(distances.max(initial=0)) >= code.levels.size:
        raise ValueError("a coarse weight has moved beyond the levels")
    blocks = -(-count // code.block)
    wanted = integers.unpack(moves.tobytes(), blocks) + _scales(old, code, blocks)
    # beyond these no scale is one, and decoding refuses it
    scales = wanted.clip(0, 65535).astype(np.uint16)
    codes = predicted(old, scales, code, count)
    _move(codes, distances, code.levels.size)
    return scales, codes


def _best(distances: Codes) -> int:
    """The shift that takes the fewest bits by the entropy of its tokens."""
    counts = np.bincount(distances, minlength=256)

    def bits(shift: int) -> float:
        tokens = np.bincount(np.minimum(np.arange(256) >> shift, _BEYOND), counts)
        some = tokens[tokens > 0]
        beyond = 8 * tokens[_BEYOND] if shift < _SHIFTS[-1] else 0.0
        return float(-np.sum(some * np.log2(some / some.sum())) + shift * distances.size + beyond)

    return min(_SHIFTS, key=bits)


def _scales(old: Tensor | None, code: Blocks, blocks: int) -> NDArray[np.int64]:
    """Those that the old weights have."""
    if old is None:
        return np.zeros(blocks, np.int64)
    return code.scales(old.float()).astype(np.int64)


def predicted(old: Tensor | None, scales: Scales, code: Blocks, count: int) -> Codes:
    """The codes that the old weights have under these scales."""
    codes = np.full(count, code.levels.size // 2, np.uint8)
    if old is not None:
        single = (scales.astype(np.uint32) << 16).view(np.float32)
        _nearest(flatten(old.float()), single, code.block, code.levels, codes)
    return codes
