"""The kernels of the tied map: words, look-ups and sums of many entries at a time in vector registers.

They are written in LLVM's vector instructions. From loops its compiler makes half of the lanes that a CPU has, and no
gathers, which takes twice as long. LLVM breaks the vectors down to what the CPU at hand has: the bits are the same on
any, as there is no fast-math, no fused multiply-add, and one order of sums a number.
"""

from __future__ import annotations

from collections.abc import Sequence
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
WIDTH = 4 * LANES
STEP = SETS * WIDTH
"""Entries at a time."""
TILE = 16 * STEP

_1, _16, _32, _64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_LANES, _WORDS = ir.VectorType(_64, LANES), ir.VectorType(_32, WIDTH)
_FLOATS, _SHORT = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(_16, WIDTH)
_HALVES = ir.VectorType(_16, 2 * WIDTH)


def _all(vector: ir.VectorType, value: int) -> ir.Constant:
    """A constant in every lane."""
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A 64-bit number in every lane."""
    first = builder.insert_element(ir.Constant(_LANES, ir.Undefined), value, _32(0))
    return builder.shuffle_vector(first, ir.Constant(_LANES, ir.Undefined), _all(ir.VectorType(_32, LANES), 0))


class _Generator:
    """Philox4x32-10 of Random123, as `thinwire.streams.words`, for LANES blocks a vector."""

    def __init__(self, builder: ir.IRBuilder, key: ir.Value, stream: ir.Value, block: ir.Value) -> None:
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

    def words(self, entry: ir.Value) -> list[list[ir.Value]]:
        """SETS times the four words of LANES blocks, from that of an entry on; their upper halves hold rubbish."""
        b, states = self.builder, []
        for number in range(SETS):
            first = b.add(b.add(self.block, b.lshr(entry, _64(2))), _64(LANES * number))
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
        return states


def _product(builder: ir.IRBuilder, word: ir.Value, factor: ir.Value) -> ir.Value:
    """The upper half of factor times the word without its last bit; both are of 32 bits."""
    return builder.lshr(builder.mul(builder.and_(word, _all(_LANES, 0xFFFFFFFE)), factor), _all(_LANES, 32))


def _sign(builder: ir.IRBuilder, word: ir.Value) -> ir.Value:
    """The sign bit of a float32 where the word is odd."""
    return builder.shl(builder.and_(word, _all(_LANES, 1)), _all(_LANES, 31))


def _in_order(builder: ir.IRBuilder, four: Sequence[ir.Value]) -> ir.Value:
    """What belongs to the four words of each block, in the order of the entries: 32 bits each."""
    left, right = (builder.or_(four[i], builder.shl(four[i + 1], _all(_LANES, 32))) for i in (0, 2))
    turns = [_32(i // 2 + LANES * (i % 2)) for i in range(2 * LANES)]
    pairs = builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_32, 2 * LANES), turns))
    return builder.bitcast(pairs, _WORDS)


def _place(builder: ir.IRBuilder, array: Any, entry: ir.Value, vector: ir.VectorType) -> ir.Value:
    return builder.bitcast(builder.gep(array.data, [entry]), vector.as_pointer())


def _load(builder: ir.IRBuilder, array: Any, entry: ir.Value, short: bool) -> ir.Value:
    """The bits of WIDTH float32, or of as many bfloat16 made float32."""
    if not short:
        return builder.load(_place(builder, array, entry, _WORDS), align=4)
    bits = builder.load(_place(builder, array, entry, _SHORT), align=2)
    return builder.shl(builder.zext(bits, _WORDS), _all(_WORDS, 16))


def _bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Rounded to the nearest, ties to even: bits, 16 each."""
    bits = builder.bitcast(value, _WORDS)
    last = builder.and_(builder.lshr(bits, _all(_WORDS, 16)), _all(_WORDS, 1))
    near = builder.add(builder.add(bits, _all(_WORDS, 0x7FFF)), last)
    nan = builder.fcmp_unordered("uno", value, value)
    halves = builder.bitcast(builder.select(nan, _all(_WORDS, 0x7FC00000), near), _HALVES)
    upper = ir.Constant(ir.VectorType(_32, WIDTH), [_32(2 * i + 1) for i in range(WIDTH)])
    return builder.shuffle_vector(halves, ir.Constant(_HALVES, ir.Undefined), upper)


@intrinsic
def _spread(typing, table, key, stream, block, start, out):
    """out = start + a number of the table for each entry; of all whole STEPs."""
    short = start.dtype.bitwidth == 16

    def generate(context, b, signature, arguments):
        table, start, out = (context.make_array(signature.args[i])(context, b, arguments[i]) for i in (0, 4, 5))
        generator = _Generator(b, *arguments[1:4])
        numbers, size = (b.extract_value(array.shape, 0) for array in (table, start))
        # four times an index is how far its number lies behind the first
        factor = _splat(b, b.and_(b.shl(numbers, _64(2)), _64(0xFFFFFFFF)))
        base = _splat(b, b.ptrtoint(table.data, _64))
        found, pointers, mask = (ir.VectorType(t, LANES) for t in (_32, ir.PointerType(_32), _1))
        kind = ir.FunctionType(found, [pointers, _32, mask, found])
        gather = cgutils.get_or_insert_function(b.module, kind, f"llvm.masked.gather.v{LANES}i32.v{LANES}p0")

        def value(word: ir.Value) -> ir.Value:
            far = b.and_(_product(b, word, factor), _all(_LANES, 0xFFFFFFFC))
            places = b.inttoptr(b.add(base, far), pointers)
            bits = b.call(gather, [places, _32(4), _all(mask, 1), ir.Constant(found, ir.Undefined)])
            return b.xor(b.zext(bits, _LANES), _sign(b, word))

        with cgutils.for_range_slice(b, _64(0), size, _64(STEP)) as (entry, _):
            for number, four in enumerate(generator.words(entry)):
                here = b.add(entry, _64(WIDTH * number))
                moved = b.bitcast(_in_order(b, [value(word) for word in four]), _FLOATS)
                total = b.fadd(b.bitcast(_load(b, start, here, short), _FLOATS), moved)
                bits = _bfloat16(b, total) if short else b.bitcast(total, _WORDS)
                b.store(bits, _place(b, out, here, bits.type), align=2 if short else 4)
        return context.get_dummy_value()

    return types.void(table, key, stream, block, start, out), generate


@intrinsic
def _sign_and_place(typing, gradient, key, stream, block, numbers, index, value):
    """The index of each entry, uint32, and the gradient with its sign, float32; of all whole STEPs of index."""
    short = gradient.dtype.bitwidth == 16

    def generate(context, b, signature, arguments):
        gradient, index, value = (context.make_array(signature.args[i])(context, b, arguments[i]) for i in (0, 5, 6))
        generator, size = _Generator(b, *arguments[1:4]), b.extract_value(index.shape, 0)
        factor = _splat(b, b.and_(arguments[4], _64(0xFFFFFFFF)))
        with cgutils.for_range_slice(b, _64(0), size, _64(STEP)) as (entry, _):
            for number, four in enumerate(generator.words(entry)):
                here = b.add(entry, _64(WIDTH * number))
                signs = _in_order(b, [_sign(b, word) for word in four])
                signed = b.bitcast(b.xor(_load(b, gradient, here, short), signs), _FLOATS)
                b.store(
                    _in_order(b, [_product(b, word, factor) for word in four]), _place(b, index, here, _WORDS), align=4
                )
                b.store(signed, _place(b, value, here, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(gradient, key, stream, block, numbers, index, value), generate


@njit(nogil=True, cache=True)
def spread(table, key, stream, block, start, out):
    """out = start + a number of the table, or minus it, for each entry; the first one is the first of a block.

    table: float32 [d]; start, out: bits of float32, uint32, or of bfloat16, uint16, in the same memory or apart.
    """
    whole = start.size // STEP * STEP
    rest = start.size - whole
    _spread(table, key, stream, block, start[:whole], out[:whole])  # type: ignore[call-arg]
    if rest:
        few = np.zeros(STEP, start.dtype)
        for e in range(rest):
            few[e] = start[whole + e]
        _spread(table, key, stream, block + np.uint64(whole // 4), few, few)
        for e in range(rest):
            out[whole + e] = few[e]


@njit(nogil=True, cache=True)
def collect(gradient, key, stream, block, total):
    """total[index] += sign gradient, in order; the first entry is the first one of a block.

    gradient: bits of float32, uint32, or of bfloat16, uint16; total: float64 [d].
    """
    index, value, last = np.empty(TILE, np.uint32), np.empty(TILE, np.float32), np.zeros(TILE, gradient.dtype)
    numbers = np.uint64(total.size)
    for here in range(0, gradient.size, TILE):
        size = min(TILE, gradient.size - here)
        piece = gradient[here : here + size]
        if size < TILE:
            for e in range(size):
                last[e] = piece[e]
            piece = last
        _sign_and_place(piece, key, stream, block + np.uint64(here // 4), numbers, index, value)  # type: ignore[call-arg]
        for e in range(size):
            total[index[e]] += value[e]
