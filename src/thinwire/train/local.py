"""The local first-order loop that many methods share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from thinwire.data.batch import Batch
from thinwire.train import parallel
from thinwire.train.differences import Differences
from thinwire.train.kept import Kept
from thinwire.train.objective import loss as batch_loss
from thinwire.train.protected import Protected

Optimiser = Literal["adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]
Moments = Literal["fresh", "kept"]
# a hand on the float32 weights with their .grad, before clipping: a proximal term, control variates, a mask
Adjust = Callable[[Sequence[Tensor]], None]


class Rule(NamedTuple):
    """How the local steps are taken; `clip` bounds the gradient's norm, 0: nothing does.

    Over an optimiser's first `warmup` steps the rate rises from near 0 to `lr`.
    """

    optimiser: Optimiser
    lr: float
    steps: int
    weight_decay: float = 0.0
    clip: float = 0.0
    warmup: int = 0


class Local(NamedTuple):
    """The mean loss of the steps taken, the steps skipped; the float32 weights in the parameters' order, if kept."""

    loss: float
    skipped: int
    weights: list[Tensor]


def scheduled(schedule: Schedule, lr: float, round: int, rounds: int) -> float:
    """The learning rate of round `round` (from 1) of `rounds`: the full one in the first, near 0 after the last."""
    done = (round - 1) / rounds
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    return lr


def train_locally(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterator[Batch],
    rule: Rule,
    *,
    adjust: Adjust | None = None,
    recompute: bool = False,
    keep: bool = False,
    kept: Kept | None = None,
    differences: Differences | None = None,
    losses: list[float] | None = None,
    protected: Protected | None = None,
) -> Local:
    """Steps on these parameters of the model, in place.

    The optimiser is fresh, unless its moments are `kept`. A step whose loss or gradient is not finite is skipped and
    counted. bf16 and fp16 weights are trained through a float32 copy, and rounded once a step; with `keep` the result
    has those copies as the last step left them. Of several processes (train.parallel) each takes a share of every
    batch; where shards are asked for, the parameters are in shards meanwhile (train.shards). `recompute`: what is
    within a transformer layer is computed again on the way back, and not kept. `losses` is given each batch's loss
    before `adjust` is called. `protected`: the examples are drawn and bounded, and the gradient noised, by its
    rule; the batches are not asked, the mean loss is NaN, and no step is skipped.
    """
    if protected is None and differences is None and parallel.wants_shards(model):
        return _in_shards(model, parameters, batches, rule, adjust, recompute, keep, kept, losses)
    sharded = parallel.is_sharded(model)
    masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
    if rule.optimiser == "adamw":
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(masters, lr=rule.lr, weight_decay=rule.weight_decay)
    else:
        optimiser = torch.optim.SGD(masters, lr=rule.lr, weight_decay=rule.weight_decay)
    before = kept.restore(optimiser, masters) if kept is not None and rule.optimiser == "adamw" else 0
    total, taken = 0.0, 0
    source: Iterator[Any] = batches if protected is None else protected.batches()
    with _recomputing(model) if recompute else contextlib.nullcontext():
        for step, batch in enumerate(islice(source, rule.steps)):
            if protected is not None:
                found = protected.clipped_gradient(model, parameters, batch)
                for master, gradient in zip(masters, found, strict=True):
                    master.grad = gradient
                if adjust is not None:
                    adjust(masters)
                taken += _stepped(optimiser, masters, parameters, rule, before + taken)
                continue
            mine, share = parallel.part(batch, always=sharded)

            def measured(mine: Batch | None = mine, share: float = share) -> Tensor:
                return torch.zeros(()) if mine is None else share * batch_loss(model, mine)

            loss = measured() if differences is None else differences.find(parameters, step, measured)
            if not math.isfinite(value := parallel.summed(loss.detach().clone()).item()):
                continue
            if losses is not None:
                losses.append(value)
            if mine is not None and differences is None:
                loss.backward()
            for parameter, master in zip(parameters, masters, strict=True):
                if parameter is not master:
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
            if not sharded:
                parallel.sum_gradients(masters)
            if adjust is not None:
                adjust(masters)
            if _stepped(optimiser, masters, parameters, rule, before + taken, rule.clip):
                total, taken = total + value, taken + 1
    if kept is not None and rule.optimiser == "adamw":
        kept.keep(optimiser, masters, before + taken)
    mean = total / taken if taken and protected is None else math.nan
    return Local(mean, rule.steps - taken, masters if keep else [])


def _in_shards(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterator[Batch],
    rule: Rule,
    adjust: Adjust | None,
    recompute: bool,
    keep: bool,
    kept: Kept | None,
    losses: list[float] | None,
) -> Local:
    """`train_locally` on the model's sharded twin."""
    from thinwire.train.shards import KeptInShards, on_whole, spread  # a second that a process alone does without

    with spread(model, parameters) as twin:
        local = train_locally(
            twin.model,
            twin.weights,
            batches,
            rule,
            adjust=None if adjust is None else partial(on_whole, adjust),
            recompute=recompute,
            keep=keep,
            kept=None if kept is None else KeptInShards(kept.memory, kept.names),
            losses=losses,
        )
        return local._replace(weights=[parallel.whole(weight.detach()) for weight in local.weights])


def _stepped(
    optimiser: torch.optim.Optimizer,
    masters: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    rule: Rule,
    before: int,
    clip: float = 0.0,
) -> bool:
    """A step along the gradients of the masters, after so many before; False where they are not finite."""
    norm = torch.nn.utils.clip_grad_norm_(masters, clip or math.inf)
    if known := bool(torch.isfinite(parallel.whole(norm))):
        for group in optimiser.param_groups:
            group["lr"] = rule.lr * min(1.0, (before + 1) / (rule.warmup + 1))
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
    return known


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
