"""How a loss curves in what is trained, and how alike a layer makes different rows: what FedPepTAO ranks layers by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thinwire.data.batch import Batch
from thinwire.keys import Key
from thinwire.train.objective import loss

FLOOR = 1e-5  # added to the eigenvalues of similarities
STEP = 0.1  # how the threshold of curvature rises at first
STILL, TIMES = 0.005, 3  # the share stands still when so many changes of it are below this


def density(model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter], steps: int, key: Key) -> NDArray[Any]:
    """Where the eigenvalues of the loss's Hessian in these parameters lie: float64 [2, n], n <= steps.

    By Lanczos from a random vector of signs: nodes, and the share of the spectrum that each stands for. A product with
    the Hessian is the difference of two gradients, so nothing has to be differentiable twice.
    """
    batch, size = replace(batch, seen=None), sum(p.numel() for p in parameters)
    start = [p.detach().clone() for p in parameters]
    words = key.words(-(-size // 64))
    signs = np.unpackbits(words.view(np.uint8), count=size, bitorder="little").astype(np.float64) * 2 - 1
    basis, diagonal, beside = [torch.from_numpy(signs / math.sqrt(size))], list[float](), list[float]()
    try:
        for _ in range(min(steps, size)):
            found = _product(model, batch, parameters, start, basis[-1])
            diagonal.append(float(found @ basis[-1]))
            for _ in range(2):  # against all before, twice: or eigenvalues would come more than once
                for vector in basis:
                    found = found - (found @ vector) * vector
            length = float(found.norm())
            if not length > 1e-6 * max(map(abs, diagonal), default=1.0):
                break
            beside.append(length)
            basis.append(found / length)
    finally:
        _put(parameters, start, None, 0.0)
    if not all(map(math.isfinite, (*diagonal, *beside))):
        return np.zeros((2, 0))
    inner = beside[: len(diagonal) - 1]
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1))
    return np.stack([nodes, vectors[0] ** 2])


def share_above(spectrum: NDArray[Any]) -> float:
    """The share of a spectrum above the threshold at which it no longer falls as the threshold rises.

    From 0 in steps of 0.1, until three changes in turn are below 0.005; anew in half the steps where the share has
    halved before. All of it, where nothing could be measured.
    """
    nodes, shares = spectrum
    if not len(nodes):
        return 1.0
    step = STEP
    while True:
        found, at = list[float](), 0.0
        while not found or found[-1] >= found[0] / 2:
            found.append(float(shares[nodes > at].sum()))
            if len(found) > TIMES and all(abs(a - b) < STILL for a, b in pairwise(found[-TIMES - 1 :])):
                return found[-1]
            at += step
        step /= 2


def alike(states: Tensor) -> float:
    """How alike rows are: the sum of log e + 1 / e over the eigenvalues e of their cosine similarities; [rows, n].

    Each row alone in its direction gives 1 a row, the least; rows in one direction give about 1e5 each.
    """
    unit = torch.nn.functional.normalize(states.detach().double().cpu(), dim=1)
    found = torch.linalg.eigvalsh(unit @ unit.T).clamp(min=0) + FLOOR
    return float((found.log() + 1 / found).sum())


@torch.no_grad()
def layer_scores(model: nn.Module, batch: Batch, stack: Sequence[nn.Module]) -> list[float]:
    """`alike` of what each layer makes of the batch's rows, a row the mean over its tokens."""
    found: list[float] = []
    mask = batch.attention_mask[..., None]

    def seen(module: nn.Module, args: Any, out: Any) -> None:
        hidden = (out if isinstance(out, Tensor) else out[0])[:, -mask.shape[1] :]  # the row's own, behind a prompt
        counted = mask.to(hidden)
        found.append(alike((hidden * counted).sum(1) / counted.sum(1)))

    with ExitStack() as hooks:
        for module in stack:
            hooks.callback(module.register_forward_hook(seen).remove)
        loss(model, replace(batch, seen=None))
    return found


def _product(
    model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter], start: Sequence[Tensor], vector: Tensor
) -> Tensor:
    """The Hessian's with a vector of length 1, float64."""
    scale = math.sqrt(sum(float(w.double().square().sum()) for w in start))
    exact = all(p.dtype == torch.float32 for p in parameters)
    step = (1e-2 if exact else 0.1) * max(1e-2, scale)  # where weights are coarse, above what they are rounded by
    sides = []
    for sign in (1, -1):
        _put(parameters, start, vector, sign * step)
        loss(model, batch).backward()
        sides.append(torch.cat([_taken(p).flatten() for p in parameters]))
    return (sides[0] - sides[1]) / (2 * step)


@torch.no_grad()
def _put(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], vector: Tensor | None, step: float) -> None:
    """Parameters := start + step vector."""
    at = 0
    for parameter, before in zip(parameters, start, strict=True):
        parameter.copy_(before)
        if vector is not None:
            own = vector[at : at + parameter.numel()].view(parameter.shape).to(parameter.device)
            parameter.copy_((parameter.double() + step * own).to(parameter.dtype))
        at += parameter.numel()


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    return (torch.zeros_like(parameter) if gradient is None else gradient).detach().double().cpu()
