"""Updates like those of a LoRA view: each factor near a low rank, of a size that differs from factor to factor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thinwire.compress.learned.lora_image import Image


def update(image: Image, seed: int, size: float = 1e-3) -> Tensor:
    """One image of such factors: two leading directions and noise, drawn from the seed."""
    draw = torch.Generator().manual_seed(seed)
    factors: Mapping[str, Tensor] = {
        name: size
        * (1 + 0.5 * i % 3)
        * (
            torch.randn(shape[0], 1, generator=draw) @ torch.randn(1, shape[1], generator=draw).sign()
            + 0.5 * torch.randn(shape[0], 1, generator=draw) @ torch.randn(1, shape[1], generator=draw)
            + 0.2 * torch.randn(shape, generator=draw)
        )
        for i, (name, shape) in enumerate(image.shapes.items())
    }
    return image.stack(factors)
