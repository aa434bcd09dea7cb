"""The map of the tied view: every entry of a tensor follows one of d numbers, entry = start + sign theta[index].

It is frozen: a change here orphans every recorded run. Entry i, in row-major order, of the tensor with the stream s, in
a run with the 64-bit key r:

    B       = 16 if d is a power of two and at most 2^15, else 32
    block   = i B div 128
    key     = (r mod 2^32, r div 2^32)
    counter = (block, 0, s mod 2^32, s div 2^32)
    w       = word i mod (128 / B) of philox4x32(counter, key), in words of B bits: of 32 bits the lower 16 come first
    index   = (w div 2) d div 2^(B - 1)
    sign    = +1 if w is even, else -1

so w is the i-th word of B bits of `thinwire.streams.words`, little-endian, and where B is 16, index is the upper log2 d
bits of it. Both passes draw it anew as they go, and hold no map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.model.views import ties_cpu
from thinwire.streams import words
from thinwire.threads import share, threads_for

BLOCK = 16
"""Bytes of a block of the generator."""
HALF = 1 << 15
"""Of up to so many numbers, where they are a power of two, index and sign take 16 bits."""
CHUNK = 1 << 16
"""Blocks that a thread takes at a time in `spread`."""
PARTS = 16
"""Into so many parts `collect` cuts a tensor at most: each has sums of its own, whatever the threads."""
MOST, LONGEST = 1 << 24, 1 << 34
"""Numbers, and entries of a tensor, at most: of an index 24 bits are exact, a block's number is one word."""


def _bits(tensor: Tensor) -> NDArray[np.uint32] | NDArray[np.uint16]:
    """The patterns of a contiguous CPU tensor of float32 or bfloat16, in its memory: [n]."""
    flat = tensor.detach().view(-1)
    if tensor.dtype == torch.float32:
        return flat.numpy().view(np.uint32)
    return flat.view(torch.int16).numpy().view(np.uint16)


@dataclass(frozen=True)
class Ties:
    """The map onto `numbers` numbers under a run's key, 64 bits; a tensor has a stream of its own, below 2^64."""

    key: int
    numbers: int

    def __post_init__(self) -> None:
        if not 0 < self.numbers <= MOST:
            raise ValueError(f"{self.numbers} numbers are not 1 to {MOST}")
        if not 0 <= self.key < 1 << 64:
            raise ValueError(f"key {self.key} has not 64 bits")

    @property
    def word(self) -> np.dtype[Any]:
        """What an entry takes of the stream."""
        return np.dtype(np.uint16 if self.numbers <= HALF and self.numbers.bit_count() == 1 else np.uint32)

    @property
    def per_block(self) -> int:
        """Entries drawn from one block."""
        return BLOCK // self.word.itemsize

    def signed(self, stream: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The map of a tensor of `count` entries as a whole, for small ones: index and sign, +1 or -1."""
        self._check(stream, count)
        drawn = words(self.key, [stream], 2 * -(-count // self.per_block)).view(self.word)[0, :count]
        index = (drawn >> 1).astype(np.uint64) * np.uint64(self.numbers) >> np.uint64(8 * drawn.itemsize - 1)
        return index.astype(np.int32), np.where(drawn & 1, np.float32(-1), np.float32(1))

    def spread(
        self, theta: Tensor, stream: int, start: Tensor, out: Tensor, scale: float = 1.0, *, threads: int | None = None
    ) -> None:
        """out := start + scale sign theta[index], in float32, rounded once to out's dtype: one pass over the weights.

        theta: float32 [d]. start, out: float32, bfloat16 or float16 of one shape; out may be start itself, or shares no
        memory with it. The same bits for any number of threads, on any CPU: weights of float16, of another device or in
        another order than row-major pass through a copy on the CPU. `threads` defaults to torch's, or to one where
        there is little to do. ValueError on all else.
        """
        self._check(stream, start.numel(), start, out)
        self._check_numbers(theta)
        if start.shape != out.shape:
            raise ValueError(f"start is {tuple(start.shape)} but out is {tuple(out.shape)}")
        direct = start.dtype == out.dtype != torch.float16
        if not direct or any(t.device.type != "cpu" or not t.is_contiguous() for t in (start, out)):
            near = torch.empty(start.shape, dtype=out.dtype if direct else torch.float32).copy_(start.detach())
            self.spread(theta, stream, near, near, scale, threads=threads)
            out.detach().copy_(near)
            return
        near = theta.detach().cpu().contiguous()
        source, target = _bits(start), _bits(out)
        table = (near if scale == 1 else near * np.float32(scale).item()).numpy()
        key, place, numbers, per = *self._drawn(stream), self.per_block

        def sweep(low: int, high: int) -> None:
            piece = slice(per * low, per * high)
            ties_cpu.spread(table, key, place, np.uint64(low), numbers, source[piece], target[piece])

        threads = threads_for(source.size, 1) if threads is None else threads
        share(sweep, 0, -(-source.size // per), threads, CHUNK)

    def collect(
        self, gradient: Tensor, stream: int, into: Tensor, scale: float = 1.0, *, threads: int | None = None
    ) -> None:
        """into[index] += scale sign gradient: the gradient for theta of what `spread` does, in one pass.

        gradient: float32, bfloat16 or float16; into: float32 [d]. Sums are float64, rounded once into
        `into`, and the same bits for any number of threads. ValueError on anything else.
        """
        size = gradient.numel()
        self._check(stream, size, gradient)
        self._check_numbers(into)
        near = gradient.detach().cpu().contiguous()
        source = _bits(near.float() if near.dtype == torch.float16 else near)
        # a part's sums are made and added up in the time of some d entries, so it has eight times as many or is alone
        parts = max(1, min(PARTS, size // (8 * self.numbers)))
        key, place, numbers, per = *self._drawn(stream), self.per_block
        # a pass over all numbers would be most of the work
        if size < self.numbers // 8 and into.device.type == "cpu" and into.is_contiguous():
            ties_cpu.collect_few(source, key, place, np.uint64(0), numbers, into.detach().numpy(), float(scale))
            return
        width = max(1, -(-size // per // parts))
        totals = np.zeros((parts, self.numbers), np.float64)

        def sweep(low: int, high: int) -> None:
            for first in range(low, high, width):
                piece = source[per * first : per * min(first + width, high)]
                ties_cpu.collect(piece, key, place, np.uint64(first), numbers, totals[first // width])

        share(sweep, 0, -(-size // per), threads_for(size, 1) if threads is None else threads, width)
        for more in totals[1:]:
            totals[0] += more
        into.detach().copy_(into.detach().cpu().double() + torch.from_numpy(totals[0]) * scale)

    def _drawn(self, stream: int) -> tuple[np.uint64, np.uint64, NDArray[Any]]:
        """What the kernels draw a map from: key, stream, and numbers of the kind of word that an entry takes."""
        # numba compiles once more for every further type, and mixes uint64 and int64 into float64
        return np.uint64(self.key), np.uint64(stream), np.array([self.numbers], self.word)

    def _check(self, stream: int, count: int, *tensors: Tensor) -> None:
        if not 0 <= stream < 1 << 64:
            raise ValueError(f"stream {stream} has not 64 bits")
        if not 0 <= count <= LONGEST:
            raise ValueError(f"{count} entries are more than {LONGEST}")
        for tensor in tensors:
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"a tensor is of float32, bfloat16 or float16; got {tensor.dtype}")

    def _check_numbers(self, numbers: Tensor) -> None:
        if numbers.dtype != torch.float32 or numbers.shape != (self.numbers,):
            raise ValueError(f"numbers are float32 [{self.numbers}]; got {numbers.dtype} {tuple(numbers.shape)}")
