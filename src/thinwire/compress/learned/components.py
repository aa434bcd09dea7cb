"""A learned codec of LoRA updates: each factor by its principal components, and these by trellises learnt from updates.

An update of a factor, [rank, width], is far from white: after a few steps of Adam its leading direction holds more than
half of its energy, and its numbers lie between a Gaussian and bare signs. So

    transform   U, the eigenvectors of M M^T, [rank, rank], for each factor M: c_j = u_j^T M are its components. U
                travels with the update, a few bits a number, and c_j is taken along U as it is decoded
    allocation  each component gets the rate out of RATES at which the next half bit would pay less than elsewhere,
                until the budget is spent: reverse water-filling, with the distortions that TGAP measured
    codewords   each rate has a trellis (entropy.trellis), whose codewords TGAP learns on components, for the first of
                a factor and for the others apart

No output saturates and no sign is lost; the code of a zero update is zero. What is decoded is made longer, so that its
product with the update is the update's own square, as EDEN does it; with `contract`, for error feedback, it has the
length of least error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.entropy import adaptive, trellis
from thinwire.compress.entropy.packing import check_key, flatten, octets, pack, unpack
from thinwire.compress.learned.lora_image import Array, Energies, Image, largest, principal

RATES = ((0, 1), (1, 2), (1, 1), (3, 2), (2, 1), (5, 2), (3, 1), (4, 1))
"""Bits a step and numbers a step of each rate: 0, 0.5, 1 .. 3 and 4 bits a number. Their order is the wire's."""
STATES = 1 << 10
KINDS = 2
"""Trellises of the first component of a factor, and of the others."""
AXIS = (5, 4, 3)
"""Bits of a number in u_1, u_2 and the later ones: a tilt of u_1 leaks the most."""
STEP = 8
"""A component's scale is the update's times a power of 2^(1/8), from 0 down to 2^-16 in 7 bits."""

Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Components:
    """The codec of images like `image` in at most `size` bytes, under tables as `codebooks` makes them.

    `tables`: for each kind and each rate but 0 the codewords book.KIND.RATE, float16 [STATES, numbers a step];
    `distortion`, float32 [KINDS, rates]: the error that each leaves of a component, 1 for rate 0; `range`, float32 [2]:
    the smallest and the largest scale of an update that was seen.

    Bytes: the scale, float32, and the bytes of the coded rates, uint32, little-endian; the rates of the components of
    each factor, first components first, coded as symbols; for each that has one, its scale and axis; then the paths of
    each kind and rate.
    """

    image: Image
    size: int
    tables: Mapping[str, Tensor]
    contract: bool = False

    def __post_init__(self) -> None:
        least = 8 + len(_coded(np.zeros((len(self._shapes), max(rank for rank, _ in self._shapes)), np.uint8)))
        if self.size < least:
            raise ValueError(f"{self.size} bytes are too few for {len(self._shapes)} factors, which take {least}")

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 [height, width] as at most `size` bytes; the key does not matter. ValueError unless x is finite."""
        check_key(key)
        flatten(x)
        blocks = self.image.blocks(x)
        energy, axes = principal(blocks)
        scale = largest(energy, blocks)
        if scale == 0:
            return np.zeros(2, "<f4").tobytes()
        budget, taken = self.size, self.size + 1
        while taken > self.size:  # what the coded rates take is known only when they are chosen
            rates = self._allocate(energy, scale, budget)
            taken = self._length(rates)
            budget -= taken - self.size
        data = self._written(blocks, axes, rates, scale)
        if self.contract:
            return data
        # All that is decoded is proportional to the scale.
        product = float((x * self._read(octets(data), scale)).sum())
        longer = float(x.square().sum()) / product if product > 0 else 1.0
        return np.array(scale * min(longer, 4.0), "<f4").tobytes() + data[4:]

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The image back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        if tuple(shape) != (self.image.height, self.image.width):
            raise ValueError(f"an image of {list(shape)}, not [{self.image.height}, {self.image.width}]")
        if not 8 <= len(data) <= self.size:
            raise ValueError(f"{len(data)} bytes, expected 8 to {self.size}")
        body = octets(data)
        scale = float(body[:4].view("<f4")[0])
        if scale == 0:
            return torch.zeros(tuple(shape))
        low, high = self.tables["range"].tolist()
        if not low / 64 <= scale <= 64 * high:  # also where it is no number
            raise ValueError(f"a scale of {scale:.3g} is beyond those trained on, {low:.3g} to {high:.3g}")
        return self._read(body, scale)

    # ---- both ends

    @cached_property
    def _shapes(self) -> list[tuple[int, int]]:
        """[rank, width] of each factor's block, in the image's order."""
        return [(min(shape), max(shape)) for shape in self.image.shapes.values()]

    @cached_property
    def _books(self) -> list[list[Array]]:
        return [
            [self.tables[f"book.{kind}.{rate}"].float().numpy() for rate in range(1, len(RATES))]
            for kind in range(KINDS)
        ]

    def _allocate(self, energy: list[Energies], scale: float, budget: int) -> Codes:
        """The rate of each component of each block, [blocks, ranks], in about `budget` bytes."""
        ranks = max(len(e) for e in energy)
        power = np.zeros((len(energy), ranks))
        for b, e in enumerate(energy):
            power[b, : len(e)] = e
        wide = np.array([width for _, width in self._shapes], np.float64)[:, None]
        distortion = self.tables["distortion"].double().numpy()
        left = np.stack([distortion[min(j, KINDS - 1)] for j in range(ranks)])  # [ranks, rates]
        bits = np.array([k / w for k, w in RATES])
        side = np.array([7 + AXIS[min(j, len(AXIS) - 1)] * ranks for j in range(ranks)])
        cost = wide[:, :, None] * bits + np.where(bits > 0, side[None, :, None] + 2.0, 0.3)
        floor = wide * (scale * 2.0 ** -(127 / STEP)) ** 2
        loss = np.where((power > floor)[:, :, None], power[:, :, None] * left[None], np.where(bits > 0, np.inf, 0))

        def chosen(price: float) -> Codes:
            found = np.argmin(loss + price * cost, axis=2).astype(np.uint8)
            return np.asarray(np.minimum.accumulate(np.where(found > 0, 1, 0), axis=1) * found, np.uint8)

        low, high = -120.0, 40.0  # of the price's logarithm
        for _ in range(48):
            middle = (low + high) / 2
            taken = chosen(scale**2 * 2.0**middle)
            spent = np.take_along_axis(cost, taken[:, :, None].astype(np.int64), 2).sum()
            low, high = (low, middle) if spent <= 8 * budget else (middle, high)
        return chosen(scale**2 * 2.0**high)

    def _length(self, rates: Codes) -> int:
        """The bytes of an update with these rates."""
        used = rates > 0
        total = 8 + len(_coded(rates)) + -(-7 * int(used.sum()) // 8)
        ranks = np.array([rank for rank, _ in self._shapes])
        for a, bits in enumerate(AXIS):
            last = used.shape[1] if a == len(AXIS) - 1 else a + 1
            total += -(-int((used[:, a:last].sum(1) * ranks).sum()) * bits // 8)
        widths = np.array([width for _, width in self._shapes])
        for kind in range(KINDS):
            mine = rates[:, kind:] if kind == KINDS - 1 else rates[:, kind : kind + 1]
            for rate, (k, width) in enumerate(RATES[1:], 1):
                steps = -(-int(((mine == rate).sum(1) * widths).sum()) // width)
                total += -(-steps * k // 8)
        return total

    def _written(self, blocks: list[Array], axes: list[Array], rates: Codes, scale: float) -> bytes:
        coded = _coded(rates)
        scales: list[int] = []
        numbers: list[list[Codes]] = [[] for _ in AXIS]
        streams: dict[tuple[int, int], list[Array]] = {}
        for block, axis, rate in zip(blocks, axes, rates, strict=True):
            used = int((rate > 0).sum())
            codes = [_axis_codes(axis[:, j], j) for j in range(used)]
            basis = _basis(codes)
            for j in range(used):
                component = basis[j] @ block
                level = _level(component, scale)
                scales.append(level)
                numbers[min(j, len(AXIS) - 1)].append(codes[j])
                streams.setdefault((min(j, KINDS - 1), int(rate[j])), []).append(component / _unit(level, scale))
        parts = [np.array(scale, "<f4").tobytes(), np.array(len(coded), "<u4").tobytes(), coded]
        parts.append(pack(np.array(scales, np.uint8), 7).tobytes())
        for held, bits in zip(numbers, AXIS, strict=True):
            parts.append(pack(np.concatenate([np.zeros(0, np.uint8), *held]), bits).tobytes())
        for kind, rate in sorted(streams):
            k, _ = RATES[rate]
            whole = _padded(np.concatenate(streams[kind, rate]), RATES[rate][1])
            parts.append(pack(trellis.encode(whole, self._books[kind][rate - 1], k), k).tobytes())
        return b"".join(parts)

    def _read(self, body: Codes, scale: float) -> Tensor:
        count, ranks = len(self._shapes), max(rank for rank, _ in self._shapes)
        length = int(body[4:8].view("<u4")[0])
        at = 8 + length
        if at > body.size:
            raise ValueError("the coded rates are longer than the code")
        coded = adaptive.decode(body[8:at].data, _contexts((count, ranks)), ranks).reshape(count, ranks)
        if int(coded.max(initial=0)) >= len(RATES):
            raise ValueError("a symbol stands for no rate")
        within = np.array([rank for rank, _ in self._shapes])[:, None] > np.arange(ranks)
        used = (coded > 0).sum(1)
        if (coded[~within] > 0).any() or ((coded > 0) != (np.arange(ranks) < used[:, None])).any():
            raise ValueError("a later component has a rate and an earlier one none")

        def take(number: int, bits: int) -> Codes:
            nonlocal at
            size = -(-number * bits // 8)
            if at + size > body.size:
                raise ValueError("the code ends too early")
            found = unpack(body[at : at + size], bits, number)
            at += size
            return found

        levels = iter(take(int(used.sum()), 7).tolist())
        axes = []
        for a, bits in enumerate(AXIS):
            last = ranks if a == len(AXIS) - 1 else a + 1
            each = [r for (r, _), n in zip(self._shapes, used, strict=True) for _ in range(a, min(int(n), last))]
            numbers, start, split = take(sum(each), bits), 0, []
            for rank in each:
                split.append(numbers[start : start + rank])
                start += rank
            axes.append(iter(split))
        slots = [(b, j) for b in range(count) for j in range(int(used[b]))]
        components: dict[tuple[int, int], Array] = {}
        for kind in range(KINDS):
            for rate in range(1, len(RATES)):
                mine = [(b, j) for b, j in slots if min(j, KINDS - 1) == kind and coded[b, j] == rate]
                if not mine:
                    continue
                k, width = RATES[rate]
                total = sum(self._shapes[b][1] for b, _ in mine)
                values, start = trellis.decode(take(-(-total // width), k), self._books[kind][rate - 1], k), 0
                for b, j in mine:
                    components[b, j] = values[start : start + self._shapes[b][1]]
                    start += self._shapes[b][1]
        if at != body.size:
            raise ValueError(f"{body.size - at} bytes too many")
        factors = {}
        for b, (name, (rank, width)) in enumerate(zip(self.image.shapes, self._shapes, strict=True)):
            codes = [next(axes[min(j, len(AXIS) - 1)]) for j in range(int(used[b]))]
            basis, block = _basis(codes), np.zeros((rank, width), np.float32)
            for j in range(int(used[b])):
                block += np.outer(basis[j], components[b, j] * _unit(next(levels), scale))
            shape = self.image.shapes[name]
            factors[name] = torch.from_numpy(block if shape[0] <= shape[1] else np.ascontiguousarray(block.T))
        return self.image.stack(factors)


def _axis_codes(axis: Array, j: int) -> Codes:
    """The numbers of a unit vector in even steps from -1 to 1."""
    top = (1 << AXIS[min(j, len(AXIS) - 1)]) - 1
    return np.clip(np.rint((axis / max(float(np.abs(axis).max()), 1e-30) + 1) / 2 * top), 0, top).astype(np.uint8)


def _basis(codes: list[Codes]) -> list[Array]:
    """The decoded axes, each made orthogonal to those before it, of length 1."""
    found: list[Energies] = []
    for j, code in enumerate(codes):
        top = (1 << AXIS[min(j, len(AXIS) - 1)]) - 1
        axis = code.astype(np.float64) / top * 2 - 1
        for _ in range(2):
            for other in found:
                axis = axis - (axis @ other) * other
        length = float(np.linalg.norm(axis))
        found.append(axis / length if length > 1e-6 else np.zeros_like(axis))
    return [axis.astype(np.float32) for axis in found]


def _level(component: Array, scale: float) -> int:
    rms = math.sqrt(float(np.square(component, dtype=np.float64).mean()))
    return min(max(round(-STEP * math.log2(rms / scale)), 0), 127) if rms > 0 else 127


def _unit(level: int, scale: float) -> np.float32:
    return np.float32(scale * 2.0 ** (-level / STEP))


def _coded(rates: Codes) -> bytes:
    return adaptive.encode(rates.reshape(-1), _contexts(rates.shape), rates.shape[1])


def _contexts(shape: tuple[int, ...]) -> Codes:
    """A component's place in its factor is its context."""
    return np.tile(np.arange(shape[1], dtype=np.uint8), shape[0])


def _padded(x: Array, width: int) -> Array:
    return np.pad(x, (0, -x.size % width))
