"""Peak memory before a run, of a client and of the server, each alone in its process: as DESIGN measures it on a CPU.

Weights, gradients and the optimiser's numbers are counted; activations come from a pass over a batch on tensors without
memory. A CPU's allocator keeps what the pass has freed while gradients fill up, so all four add up. What is left, the
tokenizer, the rows, buffers of kernels and of the allocator, is `runtime`: a constant and a copy of the largest tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.config import Run
from thinwire.core import Method
from thinwire.estimate.sketch import Pass, Sketch
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedzo import FedZO
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.train.first_order import FirstOrder

RUNTIME = 60_000_000  # bytes that have nothing to do with the model: fitted on SmolLM2-135M
CODING = 50  # bytes a weight of the largest tensor, while its exact difference is coded or decoded: fitted there too
FROZEN = 0.75  # of a layer's activations are kept where its weights are not trained
BESIDE = 2.0  # times what is alive is resident at the peak where factors are trained beside frozen weights: fitted too
PEFT = 70_000_000  # what is imported for LoRA views alone


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


def client_memory(run: Run, model: Sketch, forward: Pass) -> Memory | None:
    """A client's visit; None for a method of which nothing is known."""
    method, largest, base = run.method, model.largest_bytes, _runtime(run)
    if isinstance(method, FedZO | FedKSeed):
        weights = model.weight_bytes
        if isinstance(method, FedKSeed):
            weights += model.trained_bytes  # Net.rebuild keeps a copy for the next visit
        # one buffer of the largest module's perturbed weights, but for directions that are added to outputs
        perturbed = 0 if method.law == "lowrank" else largest
        return Memory(weights, 0, 0, forward.inference + perturbed, base + largest)
    if not isinstance(method, FirstOrder):
        return None
    if isinstance(method, FedCyBGD):
        return _proxy(method, model, forward)
    weights, optimiser = model.weight_bytes, _optimiser(method, model, model.size)
    kept, own = int(_kept(method, forward) * (1.0 if run.model.lora is None else BESIDE)), base + largest
    if isinstance(method, GradualDiff):
        # Net.rebuild's copy, and the weights that the difference is taken to
        weights += model.trained_bytes + method.held_dtype(model.dtype).itemsize * model.size
        coding = base + _coding(method, model)
        if coding > model.trained_bytes + optimiser + kept + own:  # which are gone by the time that it is coded
            return Memory(weights, 0, 0, 0, coding)
    return Memory(weights, model.trained_bytes, optimiser, kept, own)


def server_memory(run: Run, model: Sketch) -> Memory | None:
    """The server's rounds; None for a method of which nothing is known."""
    method, size, base = run.method, model.size, _runtime(run)
    if isinstance(method, FedKSeed):
        return Memory(model.weight_bytes + model.trained_bytes, 0, 0, 0, base + model.largest_bytes)
    if not isinstance(method, FirstOrder | FedZO):
        return None
    held = size * model.dtype.itemsize
    if isinstance(method, GradualDiff | FedCyBGD):
        held = size * method.held_dtype(model.dtype).itemsize
    mean = 4 * size
    if isinstance(method, GradualDiff):
        mean += held  # old and new versions, while one becomes the other
        kept = method.rounding == "residue" if method.codec == "lossless" else method.feedback
        mean += 4 * size * (kept + {"average": 0, "momentum": 1, "adam": 2, "yogi": 2}[method.server])
    if isinstance(method, FedCyBGD):
        mean = mean * min(method.blocks, 1 + method.common) // method.blocks if method.variant == "relay" else mean
    own = max(model.largest_bytes, _coding(method, model))
    return Memory(model.weight_bytes + held + mean, 0, 0, 0, base + own)


def _coding(method: Method, model: Sketch) -> int:
    exact = (isinstance(method, GradualDiff) and method.codec == "lossless") or isinstance(method, FedCyBGD)
    return CODING * model.largest_bytes // model.dtype.itemsize if exact else 0


def _runtime(run: Run) -> int:
    return RUNTIME + (PEFT if run.model.lora is not None else 0)


def _optimiser(method: FirstOrder, model: Sketch, size: int) -> int:
    moments = 8 * size if method.optimiser == "adamw" else 0
    masters = 0 if model.dtype.itemsize == 4 else 8 * size  # float32 copies, and their gradients
    return moments + masters


def _kept(method: FirstOrder, forward: Pass) -> int:
    """Activations; with recompute each layer keeps its input alone."""
    if not method.recompute:
        return forward.kept
    return max(forward.inference, forward.kept // 12)


def _proxy(method: FedCyBGD, model: Sketch, forward: Pass) -> Memory:
    """A smaller model around a block that is trained alone, others dropped or narrowed."""
    inside = sum(t.numel() for name, t in model.trained.items() if any(part.isdigit() for part in name.split(".")))
    dropped = 0.0 if method.variant == "full" else method.drop
    trained = min(method.blocks, 1 + method.common)  # blocks of most turns
    block = model.size if method.variant == "full" else inside * trained // method.blocks
    return Memory(
        model.weight_bytes - int(dropped * inside) * model.dtype.itemsize,
        block * model.dtype.itemsize,
        _optimiser(method, model, block),
        int((1 - dropped) * (1.0 if method.variant == "full" else FROZEN) * forward.kept),
        RUNTIME + model.largest_bytes,
    )
