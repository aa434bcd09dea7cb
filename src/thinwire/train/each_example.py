"""The gradient of each example of a batch in one backward pass, where linear layers are all that is trained.

Of y = x W^T the gradient is sum_t y'_t x_t^T over an example's own positions t, so that a product for each example in
place of one for all of them finds every example's (as Opacus has it, Yousefpour et al. 2021, arXiv:2109.12298). That
covers LoRA factors, cores, a classifier's head, and numbers that factors follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.data.batch import Batch
from thinwire.model.views import tying
from thinwire.train.objective import example_losses


class EachExample:
    """Finds the gradients of a model's trained parameters, each of which some linear layer holds, or follows."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], layers: Sequence[nn.Linear]) -> None:
        self.model, self.parameters, self.layers = model, parameters, layers
        self.tied = tying.of(model) if hasattr(model, tying.MODULE) else None
        self.streams = {} if self.tied is None else {id(p): i for i, p in enumerate(self.tied.followers.values())}
        self.places = {id(p): i for i, p in enumerate(parameters)}

    @classmethod
    def of(cls, model: nn.Module, parameters: Sequence[nn.Parameter]) -> EachExample | None:
        """None where something else than a linear layer is trained, or holds what follows the numbers."""
        wanted = {id(p) for p in parameters}
        if hasattr(model, tying.MODULE):
            tied = tying.of(model)
            if wanted != {id(tied.numbers)}:
                return None
            wanted = {id(p) for p in tied.followers.values()}
        layers = [module for module in model.modules() if type(module) is nn.Linear]
        held = [p for layer in layers for p in layer.parameters(recurse=False) if id(p) in wanted]
        if len(held) != len(wanted) or {id(p) for p in held} != wanted:  # another module's, or shared by two
            return None
        return cls(model, parameters, [layer for layer in layers if any(id(p) in wanted for p in layer.parameters())])

    def gradients(self, batch: Batch) -> list[Tensor] | None:
        """[examples, *shape] in float32, one a parameter; None where a layer does not see an example a row."""
        self.rows, self.examples, self.known = len(batch.input_ids), batch.examples, True
        found = [torch.zeros((batch.examples, *p.shape), device=p.device) for p in self.parameters]
        with self._watched(found):
            example_losses(self.model, batch).sum().backward()
        return found if self.known else None

    @contextmanager
    def _watched(self, found: list[Tensor]) -> Iterator[None]:
        for layer in self.layers:
            layer.forward = partial(_forward, layer, partial(self._keep, found))  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own shows again

    def _keep(self, found: list[Tensor], parameter: nn.Parameter, x: Tensor | None, above: Tensor) -> None:
        """Add what a layer's input and the gradient above it say of each example. x: None for a bias."""
        if len(above) != self.rows:
            self.known = False
            return
        above = above.reshape(self.examples, -1, above.shape[-1])
        if x is None:
            each = above.sum(1)
        else:
            each = torch.bmm(above.transpose(1, 2), x.reshape(self.examples, -1, x.shape[-1]))
        if self.tied is None:
            found[self.places[id(parameter)]] += each.float()
            return
        for gradient, numbers in zip(each, found[0], strict=True):
            self.tied.ties.collect(gradient.contiguous(), self.streams[id(parameter)], numbers)


def _forward(layer: nn.Linear, keep: Callable[[nn.Parameter, Tensor | None, Tensor], None], x: Tensor) -> Tensor:
    found: Tensor = _Linear.apply(x, torch.empty(0, requires_grad=True), layer, keep)  # type: ignore[no-untyped-call]
    return found


class _Linear(torch.autograd.Function):
    """F.linear whose weight is given no gradient of its own: who watches is given what it is made of.

    `asks` is why there is a way back at all, where x needs no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, asks: Tensor, layer: nn.Linear, keep: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.keep = layer, keep
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        layer: nn.Linear = ctx.layer
        if layer.weight.requires_grad:
            ctx.keep(layer.weight, x, above)
        if layer.bias is not None and layer.bias.requires_grad:
            ctx.keep(layer.bias, None, above)
        return above @ layer.weight if ctx.needs_input_grad[0] else None, None, None, None
