"""The tables of `components`: its codewords, learnt from updates or drawn, and the error that each rate leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.entropy import trellis
from thinwire.compress.learned.components import KINDS, RATES, STATES
from thinwire.compress.learned.lora_image import Array, Image, largest, principal


def untrained() -> dict[str, Tensor]:
    """Tables that come from no update: Gaussian codewords, for components of any scale."""
    draw = np.random.Generator(np.random.PCG64(0))
    white = draw.standard_normal(1 << 12).astype(np.float32)
    tables, distortion = {}, np.ones((KINDS, len(RATES)), np.float32)
    for rate, (k, width) in enumerate(RATES[1:], 1):
        near = math.sqrt(1 - 4.0 ** (-k / width))  # of the codewords that reach the rate-distortion bound
        book = (draw.standard_normal((STATES, width)) * near).astype(np.float16)
        distortion[:, rate] = _left(white, book, k)
        tables.update({f"book.{kind}.{rate}": torch.from_numpy(book) for kind in range(KINDS)})
    return _finished(tables, distortion, 1e-12, 1e3)


def fit(
    image: Image, updates: Sequence[Tensor], seed: int = 0, most: int = 1 << 17, rounds: int = 3
) -> dict[str, Tensor]:
    """The tables learnt from updates, images like `image`: codewords, distortions, the range of scales."""
    draw = np.random.Generator(np.random.PCG64(seed))
    seen: list[list[Array]] = [[] for _ in range(KINDS)]
    scales = []
    for update in updates:
        blocks = image.blocks(update)
        energy, axes = principal(blocks)
        scales.append(largest(energy, blocks))
        for block, axis in zip(blocks, axes, strict=True):
            for j in range(min(4, len(axis))):
                component = axis[:, j] @ block
                rms = float(np.sqrt(np.square(component).mean()))
                if rms > 0:
                    seen[min(j, KINDS - 1)].append(component / np.float32(rms))
    tables: dict[str, Tensor] = {}
    distortion = np.ones((KINDS, len(RATES)), np.float32)
    for kind, held in enumerate(seen):
        order = draw.permutation(len(held))
        x = np.concatenate([held[i] for i in order])[: 2 * most // 4 * 4]
        learn, check = x[: x.size // 8 * 4], x[x.size // 8 * 4 :]
        for rate, (k, width) in enumerate(RATES[1:], 1):
            near = math.sqrt(1 - 4.0 ** (-k / width))
            book = (draw.standard_normal((STATES, width)) * near).astype(np.float32)
            half = trellis.fit(learn, book, k, rounds).astype(np.float16)
            distortion[kind, rate] = min(_left(check, half, k), distortion[kind, rate - 1])
            tables[f"book.{kind}.{rate}"] = torch.from_numpy(half)
    return _finished(tables, distortion, min(scales), max(scales))


def _left(x: Array, book: NDArray[np.float16], k: int) -> float:
    """The share of |x|^2 that a trellis leaves."""
    wide = book.astype(np.float32)
    y = trellis.decode(trellis.encode(x, wide, k), wide, k)
    return float(np.square(x - y).mean() / np.square(x).mean())


def _finished(tables: dict[str, Tensor], distortion: Array, low: float, high: float) -> dict[str, Tensor]:
    return tables | {"distortion": torch.from_numpy(distortion), "range": torch.tensor([low, high])}
