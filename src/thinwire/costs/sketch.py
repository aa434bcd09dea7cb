"""What is known of a run before it: a model without its weights, a pass through it, and the work of a visit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

    from thinwire.model.classifier import Task


class Work(NamedTuple):
    """What a client computes in a visit: local steps; rows that pass forward, a backward pass counted as two.

    `batch`: rows of a batch, each `sides` times in one forward pass. `probes`: by perturbing weights as they are used.
    """

    steps: float = math.nan
    rows: float = math.nan
    batch: int = 1
    sides: int = 1
    probes: bool = False


@dataclass(frozen=True)
class Sketch:
    """What is trained, as tensors without memory; bytes of all weights and of the largest tensor; config and task.

    `adapted`: what is trained are factors beside frozen weights.
    """

    trained: Mapping[str, Tensor]
    weight_bytes: int
    largest_bytes: int
    config: PreTrainedConfig
    dtype: torch.dtype
    task: Task
    adapted: bool = False

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.trained.values())

    @property
    def trained_bytes(self) -> int:
        """Bytes of what is trained."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Pass:
    """A forward pass over one batch: bytes alive at its end where a backward pass is to follow, the most bytes alive
    where none is, beyond the weights both; and its floating-point operations."""

    kept: int
    inference: int
    flops: float


def within_layers(trained: Mapping[str, Tensor]) -> int:
    """How many of the numbers are inside a transformer layer."""
    return sum(t.numel() for name, t in trained.items() if any(part.isdigit() for part in name.split(".")))
