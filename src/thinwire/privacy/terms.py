"""What is added up under masks: tensors as whole numbers in a known range, and their sums modulo powers of two.

A number x travels as round(x / unit), between `low` and `high`, which all ends know from the run file. Of at most n
clients the sum of (number - low) is at most n (high - low), so it is taken modulo the least power of two above that,
and never wraps. Masks are added in words of 8 to 64 bits, and what travels has the bits of the modulus alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Words = dict[str, NDArray[Any]]  # unsigned integers, by the name of their term
BLOCK = 1 << 16  # numbers that are packed at a time


class Term(NamedTuple):
    """One tensor of what is added up: its shape, and in which multiples of `unit` its numbers lie."""

    shape: tuple[int, ...]
    unit: float
    low: int
    high: int

    def whole(self, numbers: Tensor) -> tuple[NDArray[np.int64], int]:
        """The nearest multiples, int64 [n], and how many numbers were beyond the range and were cut to it.

        ValueError for numbers of another shape, or that are not finite.
        """
        if tuple(numbers.shape) != self.shape:
            raise ValueError(f"{list(numbers.shape)} numbers where {list(self.shape)} are summed")
        found = np.rint(numbers.detach().cpu().double().numpy().ravel() / self.unit)
        if not np.isfinite(found).all():
            raise ValueError("a number is not finite")
        within = np.clip(found, self.low, self.high)
        return within.astype(np.int64), int((within != found).sum())


def even(shape: tuple[int, ...], bound: float, bits: int) -> Term:
    """A term of numbers from -bound to bound, in so many bits."""
    most = 2 ** (bits - 1) - 1
    return Term(shape, bound / most, -most, most)


class Sums:
    """The terms of sums over at most so many clients. `room`: what a number may be beyond its range, such as noise."""

    def __init__(self, terms: Mapping[str, Term], clients: int, room: int = 0) -> None:
        self.terms, self.clients, self.room = dict(terms), clients, room
        self.bits = {n: (clients * (t.high - t.low + 2 * room)).bit_length() for n, t in self.terms.items()}
        if wide := next((name for name, bits in self.bits.items() if bits > 63), None):
            raise ValueError(f"a sum of {wide} would take {self.bits[wide]} bits, 63 at most")
        self.sizes = {name: prod(term.shape) for name, term in self.terms.items()}

    @property
    def nbytes(self) -> int:
        """The bytes of a client's numbers as they travel."""
        return sum(-(-self.sizes[name] * bits // 8) for name, bits in self.bits.items())

    def words(self, numbers: Mapping[str, NDArray[np.int64]]) -> Words:
        """A client's numbers, without a mask."""
        return {
            name: (numbers[name] - (term.low - self.room)).astype(self._dtype(name))
            for name, term in self.terms.items()
        }

    def zeros(self) -> Words:
        """The sum of nobody."""
        return {name: np.zeros(size, self._dtype(name)) for name, size in self.sizes.items()}

    def add(self, total: Words, words: Words) -> None:
        """total += words."""
        for name, more in words.items():
            total[name] += more

    def mask(self, total: Words, key: bytes, sign: int) -> None:
        """total += sign * the mask of a key."""
        from thinwire.privacy.masks import stream  # what it is made of comes with an extra

        sizes = {name: size * self._dtype(name).itemsize for name, size in self.sizes.items()}
        drawn, at = stream(key, sum(sizes.values())), 0
        for name, size in sizes.items():
            part = np.frombuffer(drawn, self._dtype(name), self.sizes[name], at)
            total[name] = total[name] + part if sign > 0 else total[name] - part
            at += size

    def pack(self, words: Words) -> bytes:
        """Words as they travel: the bits of each term's modulus, the low ones first."""
        return b"".join(b"".join(self._packed(words[name], bits)) for name, bits in self.bits.items())

    def unpack(self, data: bytes | memoryview) -> Words:
        """The inverse; ValueError for another number of bytes."""
        if len(data) != self.nbytes:
            raise ValueError(f"{len(data)} bytes of masked numbers, not {self.nbytes}")
        found, at = {}, 0
        for name, bits in self.bits.items():
            size = -(-self.sizes[name] * bits // 8)
            found[name] = self._unpacked(np.frombuffer(data, np.uint8, size, at), name, bits)
            at += size
        return found

    def sums(self, total: Words, clients: int) -> dict[str, NDArray[np.int64]]:
        """The sums of so many clients' whole numbers, int64 [n], from which all masks are gone."""
        return {
            name: (total[name].astype(np.int64) & ((1 << self.bits[name]) - 1)) + clients * (term.low - self.room)
            for name, term in self.terms.items()
        }

    def _dtype(self, name: str) -> np.dtype[Any]:
        bits = self.bits[name]
        return np.dtype(next(f"<u{size}" for size in (1, 2, 4, 8) if bits <= 8 * size))

    def _packed(self, words: NDArray[Any], bits: int) -> Iterator[bytes]:
        if bits == 8 * words.itemsize:
            yield words.tobytes()
            return
        for start in range(0, words.size, BLOCK):  # a multiple of 8 numbers is a whole number of bytes
            rows = words[start : start + BLOCK].reshape(-1, 1).view(np.uint8)
            yield np.packbits(np.unpackbits(rows, axis=1, bitorder="little")[:, :bits], bitorder="little").tobytes()

    def _unpacked(self, data: NDArray[np.uint8], name: str, bits: int) -> NDArray[Any]:
        dtype, size = self._dtype(name), self.sizes[name]
        if bits == 8 * dtype.itemsize:
            return data.view(dtype).copy()
        found = np.empty(size, dtype)
        for start in range(0, size, BLOCK):
            count = min(BLOCK, size - start)
            rows = np.unpackbits(data[start * bits // 8 :], count=count * bits, bitorder="little").reshape(count, bits)
            wide = np.zeros((count, 8 * dtype.itemsize), np.uint8)
            wide[:, :bits] = rows
            found[start : start + count] = np.packbits(wide, axis=1, bitorder="little").view(dtype)[:, 0]
        return found
