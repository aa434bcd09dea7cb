"""Peak memory before a run, of a client and of the server, each alone in its process: as DESIGN measures it on a CPU.

Weights, gradients and the optimiser's numbers are counted; activations come from a pass over a batch on tensors without
memory. A CPU's allocator keeps what the pass has freed while gradients fill up, so all four add up. What is left, the
tokenizer, the rows, buffers of kernels and of the allocator, is `runtime`: a constant and a copy of the largest tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from thinwire.costs.sketch import Pass, Sketch

if TYPE_CHECKING:
    import torch

RUNTIME = 60_000_000  # bytes that have nothing to do with the model: fitted on SmolLM2-135M
CODING = 50  # bytes a weight of the largest tensor, while its exact difference is coded or decoded: fitted there too
FROZEN = 0.75  # of a layer's activations are kept where its weights are not trained
BESIDE = 2.0  # times what is alive is resident at the peak where factors are trained beside frozen weights: fitted too
PEFT = 70_000_000  # what is imported for LoRA views alone
CODECS = 50_000_000  # the compiled kernels of the codecs of whole updates
IMAGE = 16  # bytes a number of an update, while all of it is coded or decoded at once
MOMENTS = {"plain": 0, "momentum": 1, "nesterov": 1, "adam": 2, "yogi": 2}  # floats a weight of a server's step

Side = Literal["client", "server"]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, in parts; copies of the weights that are state, mean or kept for later are `weights` too."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.runtime


def training(
    at: Sketch, forward: Pass, optimiser: str, recompute: bool = False, copies: int = 0, coding: int = 0
) -> Memory:
    """A client's first-order steps on all that is trained, beside `copies` bytes of weights.

    `coding`: bytes that the coding of its reply takes, when all but the weights is gone.
    """
    weights, moments, own = at.weight_bytes + copies, moments_of(optimiser, at.size, at.dtype), _runtime(at)
    kept = max(forward.inference, forward.kept // 12) if recompute else forward.kept  # each layer keeps its input alone
    kept = int(kept * (BESIDE if at.adapted else 1.0))
    if own + coding > at.trained_bytes + moments + kept + own + at.largest_bytes:
        return Memory(weights, 0, 0, 0, own + coding)
    return Memory(weights, at.trained_bytes, moments, kept, own + at.largest_bytes)


def probing(at: Sketch, forward: Pass, law: str, copies: int = 0) -> Memory:
    """A client's two-sided probes, beside `copies` bytes of weights: memory as for inference."""
    # one buffer of the largest module's perturbed weights, but for directions that are added to outputs
    perturbed = 0 if law == "lowrank" else at.largest_bytes
    return Memory(at.weight_bytes + copies, 0, 0, forward.inference + perturbed, _runtime(at) + at.largest_bytes)


def holding(at: Sketch, copies: int, coding: int = 0) -> Memory:
    """A server's net and `copies` bytes beside it: state, mean, what is remembered; `coding`: what that takes."""
    return Memory(at.weight_bytes + copies, 0, 0, 0, _runtime(at) + max(at.largest_bytes, coding))


def averaging(at: Sketch, step: str, copies: int = 0, coding: int = 0) -> Memory:
    """A server with the weights, their float32 mean, what its `step` remembers, and `copies` bytes more."""
    return holding(at, at.trained_bytes + 4 * at.size * (1 + MOMENTS[step]) + copies, coding)


def moments_of(optimiser: str, size: int, dtype: torch.dtype) -> int:
    """Bytes of an optimiser's numbers, and of the float32 copies of weights that are shorter, with their gradients."""
    return (8 * size if optimiser == "adamw" else 0) + (0 if dtype.itemsize == 4 else 8 * size)


def exact_coding(at: Sketch) -> int:
    """Bytes that the exact difference of the largest tensor takes while it is coded or decoded."""
    return CODING * at.largest_bytes // at.dtype.itemsize


def image_coding(at: Sketch) -> int:
    """Bytes that a codec of whole updates takes, its compiled kernels with it."""
    return CODECS + IMAGE * at.size


def _runtime(at: Sketch) -> int:
    return RUNTIME + (PEFT if at.adapted else 0)
