"""The local first-order loop that many methods share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from thinwire.data.batch import Batch
from thinwire.train import parallel
from thinwire.train.objective import loss as batch_loss

Optimiser = Literal["adamw", "sgd"]


def train_locally(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterator[Batch],
    steps: int,
    optimiser: Optimiser,
    lr: float,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    masters: list[Tensor] | None = None,
    recompute: bool = False,
) -> tuple[float, int]:
    """`steps` steps on these parameters of the model, in place; returns (mean loss of the steps taken, steps skipped).

    The optimiser is fresh. A step whose loss or gradient is not finite is skipped and counted. bf16 and fp16 weights
    are trained through a float32 copy, and rounded once a step. `clip` bounds the gradient's norm, 0: nothing does.
    Of several processes (train.parallel) each takes a share of every batch.
    An empty list for `masters` then holds those copies as the last step left them, one a parameter, in order.
    `recompute`: what is within a transformer layer is computed again on the way back, and not kept.
    """
    masters = [] if masters is None else masters
    masters += [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
    if optimiser == "adamw":
        rule: torch.optim.Optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=weight_decay)
    else:
        rule = torch.optim.SGD(masters, lr=lr, weight_decay=weight_decay)
    total, taken = 0.0, 0
    with _recomputing(model) if recompute else contextlib.nullcontext():
        for batch in islice(batches, steps):
            mine, share = parallel.part(batch)
            loss = torch.zeros(()) if mine is None else share * batch_loss(model, mine)
            if not math.isfinite(value := parallel.summed(loss.detach().clone()).item()):
                continue
            if mine is not None:
                loss.backward()
            for parameter, master in zip(parameters, masters, strict=True):
                if parameter is not master:
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
            parallel.sum_gradients(masters)
            norm = torch.nn.utils.clip_grad_norm_(masters, clip or math.inf)
            if torch.isfinite(norm):
                rule.step()
                total, taken = total + value, taken + 1
            rule.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, master in zip(parameters, masters, strict=True):
                    if parameter is not master:
                        parameter.copy_(master)
    return total / taken if taken else math.nan, steps - taken


@contextlib.contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """A model whose layers keep their inputs alone for the way back."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        # no generator is put back before the second pass: there is no dropout in training here
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again
