"""Rows that are points of the input-embedding space: what a model scores them with, and how a set of them is learnt.

A set has for each class some prompts [rows, length, width], and no words. Its gradient is to be that of real rows:

    D(S) = sum_t |g_t(S) - g_t|^2 / sum_t |g_t|^2        t: the tensors that are trained, and that points reach

(Zhao, Mopuri and Bilen 2021, arXiv:2006.05929, there by cosines). D is followed by Adam on S.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thinwire.model.errors import ModelError

Answers = Sequence[Sequence[int]]  # the tokens of each class's answer; without any, a classifier's classes


def table(model: nn.Module) -> Tensor:
    """The model's input embeddings: [tokens, width]."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight: Tensor = embedding.weight
    return weight


def scores(model: nn.Module, rows: Tensor, answers: Answers) -> Tensor:
    """The log-probabilities of the classes' answers after each row, float32 [rows, classes], of a sum that is not 1.

    As train.objective's `scores` of rows with words. Differentiable, also by the rows, of any float dtype.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows, options = rows.to(embedding.weight.dtype), _options(model)
    if not any(answers):
        mask = torch.ones(rows.shape[:2], dtype=torch.int64, device=rows.device)
        return F.log_softmax(model(inputs_embeds=rows, attention_mask=mask, **options).logits.float(), dim=-1)
    longest, count = max(map(len, answers)), len(answers)
    if longest == 1:
        tokens = torch.tensor([answer[0] for answer in answers], device=rows.device)
        return F.log_softmax(model(inputs_embeds=rows, **options).logits[:, -1, tokens].float(), dim=-1)
    # what follows a shorter answer is not seen by it, whose positions are earlier
    padded = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=rows.device)
    counts = torch.tensor([[i < len(answer) for i in range(longest)] for answer in answers], device=rows.device)
    after = embedding(padded[:, :-1]).repeat(len(rows), 1, 1)
    inputs = torch.cat([rows.repeat_interleave(count, 0), after], 1)
    logits = model(inputs_embeds=inputs, **options).logits[:, rows.shape[1] - 1 :].float()
    each = F.log_softmax(logits, dim=-1).gather(2, padded.repeat(len(rows), 1)[..., None])[..., 0]
    return (each * counts.repeat(len(rows), 1)).sum(1).view(len(rows), count)


def losses(model: nn.Module, rows: Tensor, classes: Tensor, answers: Answers) -> Tensor:
    """The cross-entropies of rows [n, length, width] of those classes, int64 [n]: float32 [n]."""
    return F.cross_entropy(scores(model, rows, answers), classes, reduction="none")


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """D: how far gradients are from those that are wanted, as a part of their squared length; float32 scalar."""
    apart = sum(
        ((one.float() - other).square().sum() for one, other in zip(found, wanted, strict=True)), torch.zeros(())
    )
    length = sum((other.square().sum() for other in wanted), torch.zeros(()))
    return apart / length.clamp(min=torch.finfo(torch.float32).tiny)


def matched(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Tensor,
    label: int,
    answers: Answers,
    wanted: Iterator[Sequence[Tensor]],
    lr: float,
) -> tuple[Tensor, float]:
    """The rows of one class after a step of Adam for each of the `wanted` gradients, float32; the last distance.

    The model's weights are those at which a gradient that has been asked for was taken.
    """
    rows = rows.detach().clone().requires_grad_()
    rule, last = torch.optim.Adam([rows], lr=lr), float("nan")
    classes = torch.full((len(rows),), label, device=rows.device)
    for gradients in wanted:
        with sdpa_kernel(SDPBackend.MATH):  # the only one whose gradient has a gradient
            loss = losses(model, rows, classes, answers).mean()
            found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            # points are not looked up: where nothing else reads the table, it has no gradient to compare
            pairs = [(one, other) for one, other in zip(found, gradients, strict=True) if one is not None]
            if not pairs:
                raise ModelError("model.view: what is trained has no gradient where rows are points, and not words")
            apart = distance(*zip(*pairs, strict=True))
            (rows.grad,) = torch.autograd.grad(apart, [rows])
        if math.isfinite(apart.item()) and torch.isfinite(rows.grad).all():
            rule.step()
            last = apart.item()
    return rows.detach(), last


def _options(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
