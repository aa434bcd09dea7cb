"""The factors of a LoRA view as one image: a whole update in one matrix, without a padded number.

A factor A is [rank, in], a factor B is [out, rank]; in an image A stands as it is and B transposed, so that a block is
[rank, width]. Two orders (`Image.paper`, `Image.packed`):

    paper    CG-FedLLM, section 3: layer by layer and module by module, the column blocks A^T and B side by side in
             [width, rows]. All blocks must have one width, the hidden size: grouped-query models do not fit
    packed   blocks of the widest width first, layer by layer, then narrower ones, row after row, cut into rows of one
             width for which both sides are multiples of `side`. Grouped-query models fit where such a width exists
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
Energies = NDArray[np.float64]

SIDE = 64
"""Both sides of an image are multiples of this: the autoencoder halves them six times."""


@dataclass(frozen=True)
class Image:
    """Where each factor lies: `shapes` by name in the order of the blocks; the image is [height, width].

    `upright`: blocks are columns (the paper's), not rows.
    """

    shapes: Mapping[str, tuple[int, ...]]
    height: int
    width: int
    upright: bool = False

    @classmethod
    def paper(cls, shapes: Mapping[str, tuple[int, ...]], side: int = SIDE) -> Image:
        """The paper's image, [hidden, 2 modules layers rank]; ValueError where the factors differ in width."""
        widths = {max(shape) for shape in _checked(shapes).values()}
        count = sum(math.prod(shape) for shape in shapes.values())
        width = max(widths)
        if len(widths) > 1:
            raise ValueError(f"the paper's image needs factors of one width, got {sorted(widths)}; use the packed one")
        if width % side or count // width % side:
            raise ValueError(f"an image of {width} x {count // width} has a side that is no multiple of {side}")
        return cls(dict(shapes), width, count // width, True)

    @classmethod
    def packed(cls, shapes: Mapping[str, tuple[int, ...]], side: int = SIDE) -> Image:
        """The image that pads nothing; ValueError where no width has both sides a multiple of `side`.

        The width is that of the widest factors if it serves, else the one that makes the image nearest to a square.
        """
        _checked(shapes)
        count = sum(math.prod(shape) for shape in shapes.values())
        widest = max(max(shape) for shape in shapes.values())
        serving = [w for w in range(side, count // side + 1, side) if count % w == 0 and count // w % side == 0]
        if not serving:
            raise ValueError(f"{count} numbers make no image with both sides a multiple of {side}")
        width = widest if widest in serving else min(serving, key=lambda w: abs(math.log(w * w / count)))
        order = sorted(shapes, key=lambda name: -max(shapes[name]))  # stable: layer by layer within a width
        return cls({name: tuple(shapes[name]) for name in order}, count // width, width)

    @property
    def count(self) -> int:
        """Numbers in it."""
        return self.height * self.width

    def stack(self, factors: Mapping[str, Tensor]) -> Tensor:
        """The factors as one image, float32 [height, width] on the CPU."""
        blocks = [_block(factors[name].detach().float().cpu(), shape) for name, shape in self.shapes.items()]
        if self.upright:
            return torch.cat([block.T for block in blocks], dim=1)
        return torch.cat([block.reshape(-1) for block in blocks]).view(self.height, self.width)

    def unstack(self, image: Tensor) -> dict[str, Tensor]:
        """The inverse of `stack`, bit for bit; ValueError for an image of another shape."""
        if tuple(image.shape) != (self.height, self.width):
            raise ValueError(f"an image of {list(image.shape)}, not [{self.height}, {self.width}]")
        flat = (image.T if self.upright else image).reshape(-1)
        factors, at = {}, 0
        for name, shape in self.shapes.items():
            block = flat[at : at + math.prod(shape)]
            factors[name] = _factor(block, shape).contiguous()
            at += math.prod(shape)
        return factors

    def blocks(self, image: Tensor) -> list[Array]:
        """Each factor's block of an image on the CPU, float32 [rank, width]."""
        factors = self.unstack(image).values()
        return [np.ascontiguousarray((f if f.shape[0] <= f.shape[1] else f.T).numpy()) for f in factors]


def principal(blocks: list[Array]) -> tuple[list[Energies], list[Array]]:
    """The energies of each block's components, descending, and its axes as columns."""
    energies, axes = [], []
    for block in blocks:
        values, vectors = np.linalg.eigh(block.astype(np.float64) @ block.T.astype(np.float64))
        energies.append(np.maximum(values[::-1], 0))
        axes.append(np.ascontiguousarray(vectors[:, ::-1]).astype(np.float32))
    return energies, axes


def largest(energy: list[Energies], blocks: list[Array]) -> float:
    """The largest root mean square of a component, as float32 holds it."""
    return float(np.float32(math.sqrt(max(e[0] / b.shape[1] for e, b in zip(energy, blocks, strict=True)))))


def _checked(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    if not shapes or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError("an image is made of factors with two sides each")
    return shapes


def _block(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[rank, width] of A [rank, width] or B [width, rank]."""
    if tuple(factor.shape) != tuple(shape):
        raise ValueError(f"a factor of {list(factor.shape)}, not {list(shape)}")
    return factor if shape[0] <= shape[1] else factor.T


def _factor(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat.view(shape) if shape[0] <= shape[1] else flat.view(shape[1], shape[0]).T
