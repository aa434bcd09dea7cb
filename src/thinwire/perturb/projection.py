"""What an update is along directions: z_s . x for many seeds, tile by tile, without a direction in memory as a whole.

Products in float32, sums in float64, in one order whatever the device and the threads. For signs a word of 32 seeds is
drawn once: each element is added to one of 256 sums for each of its bytes, and the sums are taken apart at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from thinwire.perturb import gaussian_cpu, philox
from thinwire.perturb.directions import Directions
from thinwire.perturb.sign_cpu import GROUP
from thinwire.streams import LOW, draw

TILE = 1 << 16
"""Elements at a time: a multiple of four."""
BLOCKS = 256  # of four elements, drawn at a time

# every integer in the kernel is uint64: numba turns a mix of signed and unsigned into float64
_8, _16, _24, _32 = (np.uint64(i) for i in (8, 16, 24, 32))
_BYTE = np.uint64(255)
_SIGNS = (np.arange(256)[:, None] >> np.arange(8) & 1) * 2.0 - 1.0
"""The eight signs that each byte stands for: float64 [256, 8]."""


def project(
    directions: Directions, x: Tensor, name: str, seeds: Sequence[int] | NDArray[np.integer]
) -> NDArray[np.float64]:
    """z_s . x of a tensor for each seed: float64 [seeds]. The law of the directions is gaussian, sign or lowrank."""
    seeds, x = philox.check_seeds(seeds), x.detach()
    if not len(seeds) or not x.numel():
        return np.zeros(len(seeds))
    if directions.law == "lowrank" and x.dim() > 1:
        matrix, found = x.reshape(-1, x.shape[-1]).float().cpu(), np.empty(len(seeds))
        for k, seed in enumerate(seeds.tolist()):  # tr(A^T X B) / sqrt(r)
            left, right = directions.factors(name, x.shape, [seed])
            found[k] = float((matrix @ right[0]).mul_(left[0]).sum(dtype=torch.float64))
        return found / math.sqrt(directions.rank)
    flat, pid = x.reshape(-1), philox.parameter_id(name)
    tiles = ((start, flat[start : start + TILE].float().cpu().numpy()) for start in range(0, flat.numel(), TILE))
    if directions.law == "gaussian":
        found, z = np.zeros(len(seeds)), np.empty(TILE, np.float32)
        for start, tile in tiles:
            for k, seed in enumerate(seeds.tolist()):
                row = z[: tile.size]
                gaussian_cpu.accumulate(np.zeros_like(row), row, directions.key, pid, [seed], [1.0], 0.0, start)
                found[k] += float((row * tile).sum(dtype=np.float64))
        return found
    groups, which = np.unique(seeds // GROUP, return_inverse=True)
    sums = np.zeros((groups.size, 4, 256))
    for start, tile in tiles:
        _add(tile, np.uint64(start // 4), np.uint64(directions.key), np.uint64(pid), groups, sums)
    return (sums @ _SIGNS).reshape(groups.size, GROUP)[which, (seeds % GROUP).astype(np.int64)]


@njit(nogil=True, cache=True)
def _add(tile, first, key, pid, groups, sums):
    """sums[g, b, v] += each element of the tile, float32 [n] from block `first` on, whose word has v as its byte b."""
    k0, k1 = key & LOW, key >> _32
    left, right = np.empty(BLOCKS, np.uint64), np.empty(BLOCKS, np.uint64)
    for at in range(0, tile.size, 4 * BLOCKS):
        block = first + np.uint64(at // 4)
        size = min(4 * BLOCKS, tile.size - at)
        for g in range(groups.size):
            draw(block & LOW, BLOCKS, block >> _32, pid, groups[g], k0, k1, left, right)
            one, two, three, four = sums[g, 0], sums[g, 1], sums[g, 2], sums[g, 3]
            for e in range(size):
                word = right[e >> 2] if e & 2 else left[e >> 2]
                word = word >> _32 if e & 1 else word & LOW
                value = tile[at + e]
                one[word & _BYTE] += value
                two[(word >> _8) & _BYTE] += value
                three[(word >> _16) & _BYTE] += value
                four[word >> _24] += value
