"""Whole weights as they travel: a client's reply, and what is legal in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thinwire.model.net import Net
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST


@dataclass(frozen=True)
class Trained:
    """A client's weights, the examples that it holds, its mean loss over the local steps, and the steps skipped."""

    weights: Mapping[str, Tensor] = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


def check_weights(known: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Illegal unless weights have the names, shapes and dtypes of the known ones, and are within LARGEST of them."""
    if set(weights) != set(known):
        raise Illegal("the names of the weights are not the model's")
    for name, tensor in weights.items():
        mine = known[name]
        if tensor.shape != mine.shape or tensor.dtype != mine.dtype:
            raise Illegal(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {mine.dtype} {list(mine.shape)}")
        change = tensor.to(torch.float32, copy=True).sub_(mine.to(tensor.device))
        if not (change.abs_() <= LARGEST).all():
            raise Illegal(
                f"{name} is not finite" if not torch.isfinite(tensor).all() else f"{name} is beyond {LARGEST:g}"
            )


def fill_checked(net: Net, weights: Mapping[str, Tensor]) -> None:
    """`fill` with weights from elsewhere; Illegal, and nothing is copied, where they are not such a net's."""
    check_weights({name: net.base[name] for name in net.names}, weights)
    fill(net, weights)


@torch.no_grad()
def fill(net: Net, weights: Mapping[str, Tensor]) -> None:
    """Copy named weights into the net's parameters."""
    for name, parameter in net.parameters():
        parameter.copy_(weights[name])


@contextlib.contextmanager
def alone(net: Net, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """For a while these parameters require a gradient, frozen ones too, and no others: none is left with one."""
    chosen, before = {id(p) for p in parameters}, [(p, p.requires_grad) for p in net.model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)
            parameter.grad = None
