"""The kernels of the tied map: words, look-ups and sums of many entries at a time in vector registers.

They are written in LLVM's vector instructions. From loops its compiler makes half of the lanes that a CPU has, and no
gathers, which takes twice as long. LLVM breaks the vectors down to what the CPU at hand has: the bits are the same on
any, as there is no fast-math, no fused multiply-add, and one order of sums a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from thinwire.streams import MULTIPLIERS, ROUNDS, WEYL

LANES = 8
"""Blocks in one vector, a word of each in 64 bits."""
SETS = 4
"""Vectors of blocks at a time: one alone leaves the CPU waiting for its multiplications."""
STEP = SETS * LANES
"""Blocks at a time."""
TILE = 16 * STEP

_1, _16, _32, _64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_LANES = ir.VectorType(_64, LANES)


def _like(vector: ir.Value, element: ir.Type) -> ir.VectorType:
    """As many lanes of another type."""
    return ir.VectorType(element, vector.type.count)


def _all(vector: ir.VectorType, value: int) -> ir.Constant:
    """A constant in every lane."""
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def _splat(builder: ir.IRBuilder, value: ir.Value, vector: ir.VectorType = _LANES) -> ir.Value:
    """A number in every lane."""
    rest = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(rest, value, _32(0))
    return builder.shuffle_vector(first, rest, _all(ir.VectorType(_32, vector.count), 0))


class _Map:
    """Index and sign of entry after entry, from Philox4x32-10 of Random123 for LANES blocks a vector."""

    def __init__(
        self, builder: ir.IRBuilder, key: ir.Value, stream: ir.Value, block: ir.Value, numbers: ir.Value
    ) -> None:
        self.builder, self.block = builder, block
        self.low, self.half = _all(_LANES, 0xFFFFFFFF), _all(_LANES, 32)
        halves = builder.and_(key, _64(0xFFFFFFFF)), builder.lshr(key, _64(32))
        self.stream = [
            _splat(builder, builder.and_(stream, _64(0xFFFFFFFF))),
            _splat(builder, builder.lshr(stream, _64(32))),
        ]
        self.keys = [
            [_splat(builder, builder.add(half, _64(turn * weyl))) for half, weyl in zip(halves, WEYL, strict=True)]
            for turn in range(ROUNDS)
        ]
        self.bits = numbers.type.width
        """Of the word that an entry takes: 16, and then the numbers are a power of two, or 32."""
        self.width = LANES * 128 // self.bits
        """Entries in the blocks of a vector."""
        if self.bits == 16:
            shift = builder.sub(_32(16), builder.cttz(builder.zext(numbers, _32), _1(0)))
            self.scale = _splat(builder, shift, ir.VectorType(_32, self.width))
        else:
            self.scale = _splat(builder, builder.zext(numbers, _64), ir.VectorType(_64, 2 * LANES))

    def words(self, after: ir.Value) -> list[ir.Value]:
        """SETS times the words of LANES blocks, so many after the first, in the order of the stream, two a lane."""
        b, states = self.builder, []
        for number in range(SETS):
            first = b.add(b.add(self.block, after), _64(LANES * number))
            counters = b.add(_splat(b, first), ir.Constant(_LANES, [_64(lane) for lane in range(LANES)]))
            states.append([counters, _all(_LANES, 0), *self.stream])
        for k0, k1 in self.keys:
            for x in states:
                product0, product1 = (
                    b.mul(_all(_LANES, factor), b.and_(x[place], self.low))
                    for factor, place in zip(MULTIPLIERS, (0, 2), strict=True)
                )
                x[:] = (
                    b.xor(b.xor(b.lshr(product1, self.half), x[1]), k0),
                    product1,
                    b.xor(b.xor(b.lshr(product0, self.half), x[3]), k1),
                    product0,
                )
        return [self._in_order(four) for four in states]

    def _in_order(self, four: Sequence[ir.Value]) -> ir.Value:
        """The words of each block together; the upper halves of the lanes hold rubbish before."""
        b, lanes = self.builder, ir.VectorType(_32, 2 * LANES)
        turns = [_32(i // 2 + LANES * (i % 2)) for i in range(2 * LANES)]
        lower = ir.Constant(lanes, [_32(2 * turn.constant) for turn in turns])
        halves = [b.bitcast(word, lanes) for word in four]
        left, right = (b.bitcast(b.shuffle_vector(halves[i], halves[i + 1], lower), _LANES) for i in (0, 2))
        return b.shuffle_vector(left, right, ir.Constant(lanes, turns))

    def entries(self, after: ir.Value) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
        """SETS times the place of the first of `width` entries, their indices, and their signs as the sign bit."""
        b, place = self.builder, self.builder.mul(after, _64(128 // self.bits))
        entries = ir.VectorType(_32, self.width)
        for number, pairs in enumerate(self.words(after)):
            if self.bits == 16:
                words = b.zext(b.bitcast(pairs, ir.VectorType(_16, self.width)), entries)
                index = b.lshr(words, self.scale)
            else:
                half, last = _all(pairs.type, 32), _all(pairs.type, 0xFFFFFFFE)
                even, odd = (b.lshr(b.mul(b.and_(x, last), self.scale), half) for x in (pairs, b.lshr(pairs, half)))
                words, index = (b.bitcast(x, entries) for x in (pairs, b.or_(even, b.shl(odd, half))))
            yield b.add(place, _64(self.width * number)), index, b.shl(words, _all(entries, 31))

    def halves(self, after: ir.Value) -> Iterator[tuple[ir.Value, list[tuple[ir.Value, ir.Value]]]]:
        """As `entries`, of 16 bits each, two a lane: index and sign of those in the lower halves, and in the upper."""
        b, place = self.builder, self.builder.mul(after, _64(128 // self.bits))
        lanes = ir.VectorType(_32, self.width // 2)
        scale = _splat(b, b.extract_element(self.scale, _32(0)), lanes)
        for number, pairs in enumerate(self.words(after)):
            words = b.bitcast(pairs, lanes)
            lower = b.lshr(b.and_(words, _all(lanes, 0xFFFF)), scale), b.shl(words, _all(lanes, 31))
            sign = b.and_(b.shl(words, _all(lanes, 15)), _all(lanes, 1 << 31))
            upper = b.lshr(words, b.add(scale, _all(lanes, 16))), sign
            yield b.add(place, _64(self.width * number)), [lower, upper]


def _gather(builder: ir.IRBuilder, array: Any, index: ir.Value) -> ir.Value:
    """The bits of the float32 at each index."""
    found, places, mask = (_like(index, t) for t in (_32, ir.PointerType(_32), _1))
    pointers = builder.gep(array.data, [index], source_etype=_32)
    pointers.type = places  # llvmlite takes it for a single one
    kind = ir.FunctionType(found, [places, _32, mask, found])
    gather = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.masked.gather.v{found.count}i32.v{found.count}p0"
    )
    return builder.call(gather, [pointers, _32(4), _all(mask, 1), ir.Constant(found, ir.Undefined)])


def _place(builder: ir.IRBuilder, array: Any, entry: ir.Value, vector: ir.VectorType) -> ir.Value:
    return builder.bitcast(builder.gep(array.data, [entry]), vector.as_pointer())


def _load(builder: ir.IRBuilder, array: Any, entry: ir.Value, like: ir.Value, short: bool) -> ir.Value:
    """The bits of as many float32, or of bfloat16 made float32."""
    if not short:
        return builder.load(_place(builder, array, entry, like.type), align=4)
    bits = builder.load(_place(builder, array, entry, _like(like, _16)), align=2)
    return builder.shl(builder.zext(bits, like.type), _all(like.type, 16))


def _near(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Rounded to the nearest bfloat16, ties to even: the upper halves of bits, 32 each; the lower ones are rubbish."""
    bits = builder.bitcast(value, _like(value, _32))
    whole, one = _all(bits.type, 16), _all(bits.type, 1)
    near = builder.add(builder.add(bits, _all(bits.type, 0x7FFF)), builder.and_(builder.lshr(bits, whole), one))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(nan, _all(bits.type, 0x7FC00000), near)


def _bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same: bits, 16 each."""
    near = _near(builder, value)
    return builder.trunc(builder.lshr(near, _all(near.type, 16)), _like(near, _16))


def _spread_halves(b: ir.IRBuilder, drawn: _Map, table: Any, start: Any, out: Any, after: ir.Value) -> None:
    """Of bfloat16 and entries of 16 bits: all stay in the half of a lane where they lie: a fifth less arithmetic."""
    for here, ((low, minus_low), (up, minus_up)) in drawn.halves(after):
        lanes, floats = low.type, _like(low, ir.FloatType())
        held = b.load(_place(b, start, here, lanes), align=2)
        upper, half = _all(lanes, 0xFFFF0000), _all(lanes, 16)
        near = []
        for first, index, sign in ((b.shl(held, half), low, minus_low), (b.and_(held, upper), up, minus_up)):
            moved = b.bitcast(b.xor(_gather(b, table, index), sign), floats)
            near.append(_near(b, b.fadd(b.bitcast(first, floats), moved)))
        b.store(b.or_(b.lshr(near[0], half), b.and_(near[1], upper)), _place(b, out, here, lanes), align=2)


@intrinsic
def _spread(typing, table, key, stream, block, numbers, start, out):
    """out = start + a number of the table for each entry; of all whole STEPs."""
    short = start.dtype.bitwidth == 16

    def generate(context, b, signature, arguments):
        table, start, out = (context.make_array(signature.args[i])(context, b, arguments[i]) for i in (0, 5, 6))
        drawn = _Map(b, *arguments[1:5])
        blocks = b.udiv(b.extract_value(start.shape, 0), _64(128 // drawn.bits))
        with cgutils.for_range_slice(b, _64(0), blocks, _64(STEP)) as (after, _):
            if short and drawn.bits == 16:
                _spread_halves(b, drawn, table, start, out, after)
            else:
                for here, index, sign in drawn.entries(after):
                    floats = _like(index, ir.FloatType())
                    moved = b.bitcast(b.xor(_gather(b, table, index), sign), floats)
                    total = b.fadd(b.bitcast(_load(b, start, here, index, short), floats), moved)
                    bits = _bfloat16(b, total) if short else b.bitcast(total, index.type)
                    b.store(bits, _place(b, out, here, bits.type), align=2 if short else 4)
        return context.get_dummy_value()

    return types.void(table, key, stream, block, numbers, start, out), generate


@intrinsic
def _sign_and_place(typing, gradient, key, stream, block, numbers, index, value):
    """The index of each entry, uint32, and the gradient with its sign, float32; of all whole STEPs of index."""
    short = gradient.dtype.bitwidth == 16

    def generate(context, b, signature, arguments):
        gradient, index, value = (context.make_array(signature.args[i])(context, b, arguments[i]) for i in (0, 5, 6))
        drawn = _Map(b, *arguments[1:5])
        blocks = b.udiv(b.extract_value(index.shape, 0), _64(128 // drawn.bits))
        with cgutils.for_range_slice(b, _64(0), blocks, _64(STEP)) as (after, _):
            for here, found, sign in drawn.entries(after):
                signed = b.xor(_load(b, gradient, here, found, short), sign)
                b.store(found, _place(b, index, here, found.type), align=4)
                b.store(signed, _place(b, value, here, found.type), align=4)
        return context.get_dummy_value()

    return types.void(gradient, key, stream, block, numbers, index, value), generate


@njit(nogil=True, cache=True)
def spread(table, key, stream, block, numbers, start, out):
    """out = start + a number of the table, or minus it, for each entry; the first one is the first of a block.

    table: float32 [d]; numbers: d alone in an array of uint16 or uint32, as are the words that entries take; start,
    out: bits of float32, uint32, or of bfloat16, uint16, in the same memory or apart.
    """
    per = 16 // numbers.itemsize
    whole = start.size // (per * STEP) * (per * STEP)
    rest = start.size - whole
    _spread(table, key, stream, block, numbers[0], start[:whole], out[:whole])  # type: ignore[call-arg]
    if rest:
        few = np.zeros(per * STEP, start.dtype)
        for e in range(rest):
            few[e] = start[whole + e]
        _spread(table, key, stream, block + np.uint64(whole // per), numbers[0], few, few)
        for e in range(rest):
            out[whole + e] = few[e]


@njit(nogil=True, cache=True)
def collect(gradient, key, stream, block, numbers, total):
    """total[index] += sign gradient, in order; the first entry is the first one of a block.

    gradient: bits of float32, uint32, or of bfloat16, uint16; numbers: as in `spread`; total: float64 [d].
    """
    per = 16 // numbers.itemsize
    tile = per * TILE
    index, value, last = np.empty(tile, np.uint32), np.empty(tile, np.float32), np.zeros(tile, gradient.dtype)
    for here in range(0, gradient.size, tile):
        size = min(tile, gradient.size - here)
        piece = gradient[here : here + size]
        if size < tile:
            for e in range(size):
                last[e] = piece[e]
            piece = last
        first = block + np.uint64(here // per)
        _sign_and_place(piece, key, stream, first, numbers[0], index, value)  # type: ignore[call-arg]
        for e in range(size):
            total[index[e]] += value[e]


@njit(nogil=True, cache=True)
def collect_few(gradient, key, stream, block, numbers, into, scale):
    """into[index] += scale sum of sign gradient: as `collect`, of far fewer entries than numbers; into: float32 [d].

    Sums are float64 and rounded once into `into`, where an entry is: no pass over the numbers.
    """
    count = gradient.size
    per = 16 // numbers.itemsize
    size = -(-count // (per * STEP)) * per * STEP
    index, value, padded = np.empty(size, np.uint32), np.empty(size, np.float32), np.zeros(size, gradient.dtype)
    for e in range(count):
        padded[e] = gradient[e]
    _sign_and_place(padded, key, stream, block, numbers[0], index, value)  # type: ignore[call-arg]
    slots = 16
    while slots < 2 * count:
        slots *= 2
    held, totals = np.full(slots, -1, np.int64), np.zeros(slots)
    for e in range(count):
        found = np.int64(index[e])
        slot = found * 2654435761 & (slots - 1)
        while held[slot] != found and held[slot] >= 0:
            slot = slot + 1 & (slots - 1)
        held[slot] = found
        totals[slot] += value[e]
    for slot in range(slots):
        found = held[slot]
        if found >= 0:
            into[found] = np.float32(np.float64(into[found]) + totals[slot] * scale)
