"""The local first-order loop that many methods share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from thinwire.data.batch import Batch
from thinwire.model.flat import Net
from thinwire.train.objective import loss as batch_loss

Optimiser = Literal["adamw", "sgd"]


def train_locally(
    net: Net,
    batches: Iterator[Batch],
    steps: int,
    optimiser: Optimiser,
    lr: float,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    masters: list[Tensor] | None = None,
) -> tuple[float, int]:
    """`steps` steps on the net's parameters, in place; returns (mean loss of the steps taken, steps skipped).

    The optimiser is fresh. A step whose loss or gradient is not finite is skipped and counted. bf16 and fp16 weights
    are trained through a float32 copy, and rounded once a step. `clip` bounds the gradient's norm, 0: nothing does.
    An empty list for `masters` then holds those copies as the last step left them, one a parameter, in order.
    """
    parameters = [p for _, p in net.parameters()]
    masters = [] if masters is None else masters
    masters += [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
    if optimiser == "adamw":
        rule: torch.optim.Optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=weight_decay)
    else:
        rule = torch.optim.SGD(masters, lr=lr, weight_decay=weight_decay)
    total, taken = 0.0, 0
    for batch in islice(batches, steps):
        loss = batch_loss(net.model, batch)
        if not math.isfinite(value := loss.item()):
            continue
        loss.backward()
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter is not master:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
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
