"""What codecs share: the elements that they take, and small codes packed into bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

_EXPONENT = np.uint32(0x7F800000)


@njit(nogil=True, cache=True)
def _all_finite(bits):
    """Whether no number of float32 bits, uint32 [n], is infinite or not a number."""
    wrong = 0
    for i in range(bits.size):
        wrong |= (bits[i] & _EXPONENT) == _EXPONENT
    return wrong == 0


def flatten(x: Tensor) -> NDArray[np.float32]:
    """The elements in order, float32 [n], a view if x is contiguous; ValueError unless finite float32 on the CPU."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"a codec takes float32 on the CPU, got {x.dtype} on {x.device.type}")
    flat: NDArray[np.float32] = x.detach().reshape(-1).contiguous().numpy()
    if not _all_finite(flat.view(np.uint32)):
        raise ValueError("an element is not finite")
    return flat


def elements(shape: Sequence[int]) -> int:
    """The number of elements of a shape; ValueError where a dimension is negative."""
    if any(side < 0 for side in shape):
        raise ValueError(f"shape {tuple(shape)} has a negative side")
    return math.prod(shape)


def check_key(key: int) -> None:
    """ValueError unless the key is in [0, 2^64)."""
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key {key} is not in [0, 2**64)")


def octets(data: bytes | memoryview) -> NDArray[np.uint8]:
    """Bytes as uint8 [n], read-only whatever they come in, since a kernel is compiled for each kind."""
    return np.frombuffer(memoryview(data).toreadonly(), np.uint8)


def to_tensor(data: bytes) -> Tensor:
    """Bytes as payload carries them: uint8 [n]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def to_bytes(code: Tensor) -> memoryview:
    """The inverse; ValueError unless uint8 [n]."""
    if code.dtype != torch.uint8 or code.dim() != 1:
        raise ValueError(f"a code is {code.dtype} {list(code.shape)}, not bytes")
    return code.contiguous().numpy().data


@njit(nogil=True, cache=True)
def _pack(codes, bits, out):
    """Codes below 2^bits, uint8 [n], to out, uint8 [ceil(n bits / 8)], the low bits of the first byte first."""
    whole, step = codes.size // 8, np.uint64(bits)
    for g in range(whole + 1):
        word, shift = np.uint64(0), np.uint64(0)
        for j in range(8 * g, min(8 * g + 8, codes.size)):
            word |= np.uint64(codes[j]) << shift
            shift += step
        for j in range(bits * g, min(bits * g + bits, out.size)):
            out[j] = word & np.uint64(255)
            word >>= np.uint64(8)


@njit(nogil=True, cache=True)
def _unpack(data, bits, codes):
    """The inverse of `_pack`; False where a bit after the last code is set."""
    whole, step, mask = codes.size // 8, np.uint64(bits), (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for g in range(whole):  # eight codes, without a condition: vector code
        word = np.uint64(0)
        for j in range(bits):
            word |= np.uint64(data[bits * g + j]) << np.uint64(8 * j)
        for j in range(8):
            codes[8 * g + j] = (word >> np.uint64(j) * step) & mask
    word = np.uint64(0)
    for j in range(bits * whole, data.size):
        word |= np.uint64(data[j]) << np.uint64(8 * (j - bits * whole))
    for j in range(8 * whole, codes.size):
        codes[j] = word & mask
        word >>= step
    return word == 0


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes below 2^bits, uint8 [n], as uint8 [ceil(n bits / 8)], the low bits of the first byte first; bits 1 to 8."""
    if bits == 8:
        return codes
    out = np.empty(-(-codes.size * bits // 8), np.uint8)
    _pack(codes, bits, out)
    return out


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The inverse of `pack` for `count` codes, from exactly its bytes; ValueError where a bit after the last is set."""
    if bits == 8:
        return data
    codes = np.empty(count, np.uint8)
    if not _unpack(data, bits, codes):
        raise ValueError("packed codes have a bit set after the last")
    return codes
