"""The local first-order loop that many methods share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
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
from thinwire.train.objective import loss as batch_loss
from thinwire.train.protected import Protected

Optimiser = Literal["adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]
Moments = Literal["fresh", "kept"]
MOMENTS = "moments/"  # what begins their names in a client's memory
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


class Kept:
    """An optimiser's moments and count of steps, from visit to visit, in a client's memory.

    "moments/first/NAME" and "moments/second/NAME", float32 in the parameter's shape, and "moments/steps". A client
    without them, or with those of another shape, begins anew.
    """

    def __init__(self, memory: MutableMapping[str, Tensor], names: Sequence[str]) -> None:
        self.memory, self.names = memory, names

    def restore(self, optimiser: torch.optim.Optimizer, weights: Sequence[Tensor]) -> int:
        """Give the optimiser of these weights what is kept of them; how many steps it has then taken."""
        found = [[self.memory.get(f"{MOMENTS}{which}/{name}") for which in ("first", "second")] for name in self.names]
        steps = self.memory.get(f"{MOMENTS}steps")
        for (first, second), weight in zip(found, weights, strict=True):
            if steps is None or first is None or second is None or not first.shape == second.shape == weight.shape:
                return 0
        assert steps is not None
        for (first, second), weight in zip(found, weights, strict=True):
            moments = {"exp_avg": first, "exp_avg_sq": second}
            optimiser.state[weight] = {"step": steps.float().clone()} | {
                key: moment.to(weight.device, copy=True) for key, moment in moments.items() if moment is not None
            }
        return int(steps)

    def keep(self, optimiser: torch.optim.Optimizer, weights: Sequence[Tensor], steps: int) -> None:
        """Keep what the optimiser has of these weights; a weight that no step has moved has zeros."""
        for name, weight in zip(self.names, weights, strict=True):
            held = optimiser.state.get(weight, {})
            for which, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
                moment = held.get(key)
                self.memory[f"{MOMENTS}{which}/{name}"] = (
                    torch.zeros(weight.shape) if moment is None else moment.detach().cpu()
                )
        self.memory[f"{MOMENTS}steps"] = torch.tensor(steps)


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
    batch. `recompute`: what is within a transformer layer is computed again on the way back, and not kept. `losses` is
    given each batch's loss before `adjust` is called. `protected`: the examples are drawn and bounded, and the gradient
    noised, as it says; the batches are not asked, the mean loss is NaN, and no step is skipped.
    """
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
            mine, share = parallel.part(batch)

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
            parallel.sum_gradients(masters)
            if adjust is not None:
                adjust(masters)
            if _stepped(optimiser, masters, parameters, rule, before + taken, rule.clip):
                total, taken = total + value, taken + 1
    if kept is not None and rule.optimiser == "adamw":
        kept.keep(optimiser, masters, before + taken)
    mean = total / taken if taken and protected is None else math.nan
    return Local(mean, rule.steps - taken, masters if keep else [])


def _stepped(
    optimiser: torch.optim.Optimizer,
    masters: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    rule: Rule,
    before: int,
    clip: float = 0.0,
) -> bool:
    """A step along the gradients of the masters, after so many before; False where they are not finite."""
    if known := bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(masters, clip or math.inf))):
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
