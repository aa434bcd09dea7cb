"""The specification of the Gaussian directions, in plain numpy. It is frozen: a change here orphans every recorded run.

The generator is Philox4x32-10 of Random123 (Salmon et al., SC 2011). Element e of the direction of seed s for the
parameter with id p, in a run with the 64-bit key r:

    block   = e // 8
    key     = (r mod 2^32, r div 2^32)
    counter = (block mod 2^32, block div 2^32, p, s)
    w0..w3  = philox4x32(counter, key)
    i       = the 16-bit half number e mod 8 of the list low(w0), high(w0), low(w1), high(w1), ..., high(w3)
    z       = Phi^-1((i + 1/2) / 65536), from the table of `thinwire.perturb.normal_table`

Any element is reached from its address alone, so a slice of a direction costs its own length and no more. The
directions have the table's law: mean exactly 0, variance 0.99993, no value beyond 4.33 (one number in 65,536 stands
for each tail).

Covered: reproducible directions, bit-identical on every machine. Not covered: secrecy; Philox is no cipher.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thinwire.perturb.normal_table import quantiles
from thinwire.streams import MULTIPLIERS, ROUNDS, WEYL

BLOCK = 8
"""Elements drawn from one block of four 32-bit words."""

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10: uint32 [..., 4] counters and uint32 [..., 2] keys (they broadcast) to uint32 [..., 4] words."""
    counter, key = np.asarray(counter, dtype=np.uint32), np.asarray(key, dtype=np.uint32)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for turn in range(ROUNDS):
        r0 = (k0 + np.uint64(turn * WEYL[0])) & _LOW
        r1 = (k1 + np.uint64(turn * WEYL[1])) & _LOW
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ r0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ r1,
            product0 & _LOW,
        )
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def parameter_id(name: str) -> int:
    """The 32-bit id of a parameter: BLAKE2s of its UTF-8 name with a 4-byte digest, read as little-endian."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def check_address(run_key: int, pid: int, start: int) -> None:
    """ValueError unless run_key is in [0, 2^64), pid in [0, 2^32) and start in [0, 2^62)."""
    for name, value, bits in (("run key", run_key, 64), ("parameter id", pid, 32), ("start", start, 62)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} {value} is not in [0, 2**{bits})")


def check_seeds(seeds: ArrayLike) -> NDArray[np.uint64]:
    """Seeds as uint64 [k]; ValueError unless they are one-dimensional integers in [0, 2^32)."""
    array = np.asarray(seeds)
    if array.ndim != 1:
        raise ValueError(f"seeds have shape {array.shape}, expected one dimension")
    if array.size == 0:
        return np.empty(0, dtype=np.uint64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"seeds have dtype {array.dtype}, expected integers")
    if array.min() < 0 or array.max() > 0xFFFFFFFF:
        raise ValueError("a seed is not in [0, 2**32)")
    return np.ascontiguousarray(array, dtype=np.uint64)


def check_pairs(seeds: ArrayLike, coefs: ArrayLike) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Seeds as uint64 [k], see check_seeds, and a coefficient for each, rounded to float32; ValueError otherwise."""
    seeds, coefs = check_seeds(seeds), np.asarray(coefs, dtype=np.float32)
    if seeds.shape != coefs.shape:
        raise ValueError(f"{seeds.size} seeds but coefficients of shape {coefs.shape}")
    return seeds, np.ascontiguousarray(coefs)


def gaussian(run_key: int, seed: int, pid: int, start: int, count: int) -> NDArray[np.float32]:
    """Elements start .. start + count of direction `seed` for parameter `pid`: float32 [count].

    ValueError where an address is out of its range.
    """
    check_address(run_key, pid, start)
    check_seeds([seed])
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    blocks = np.arange(first, last, dtype=np.uint64)
    counter = np.empty((blocks.size, 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = blocks & _LOW, blocks >> _SHIFT
    counter[:, 2], counter[:, 3] = pid, seed
    words = philox4x32(counter, [run_key & 0xFFFFFFFF, run_key >> 32])
    # little-endian words, so that the low half of each comes first whatever the machine
    numbers = words.astype("<u4").view("<u2").reshape(-1)
    found: NDArray[np.float32] = quantiles()[numbers[start - BLOCK * first :][:count]]
    return found


def accumulate(
    weight: NDArray[np.float32],
    run_key: int,
    pid: int,
    seeds: ArrayLike,
    coefs: ArrayLike,
    scale: float = 1.0,
    start: int = 0,
) -> NDArray[np.float32]:
    """Replay: scale * weight + sum_k coefs[k] * z_{seeds[k]}, as float32 [n] for weight float32 [n] at element `start`.

    The sum begins at +0.0 and runs in the given order; each product and each sum is rounded to float32, never fused.
    With no seeds nothing is added, so that weights of -0.0 survive an empty replay.
    """
    seeds, coefs = check_pairs(seeds, coefs)
    scaled = weight.copy() if scale == 1 else np.float32(scale) * weight
    if seeds.size == 0:
        return scaled
    total = np.zeros(weight.size, dtype=np.float32)
    for seed, coef in zip(seeds.tolist(), coefs, strict=True):
        total = total + coef * gaussian(run_key, seed, pid, start, weight.size)
    return scaled + total
