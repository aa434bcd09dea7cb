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
from thinwire.wire.payload import specs_of

PART = 1 << 16  # numbers that are looked at together: a copy of the largest tensor would be half of a small model


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
    like = specs_of(known)
    for name, spec in specs_of(weights).items():
        if spec != (mine := like[name]):
            raise Illegal(f"{name} is {spec.dtype} {list(spec.shape)}, not {mine.dtype} {list(mine.shape)}")
        tensor, before = weights[name].flatten(), known[name].flatten()
        for part, old in zip(tensor.split(PART), before.split(PART), strict=True):
            if not (part.to(torch.float32, copy=True).sub_(old.to(part.device)).abs_() <= LARGEST).all():
                finite = torch.isfinite(tensor).all()
                raise Illegal(f"{name} is beyond {LARGEST:g}" if finite else f"{name} is not finite")


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What weights have changed by, float32, of the names in `after`."""
    return {name: tensor.float() - before[name].to(tensor.device).float() for name, tensor in after.items()}


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
