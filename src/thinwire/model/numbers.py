"""A net's start, and what it trains as one row of numbers: its change from there, in the order of the net's names."""

from __future__ import annotations

import hashlib
from operator import itemgetter

import torch
from torch import Tensor

from thinwire.model.net import Net
from thinwire.wire.frame import absorb


@torch.no_grad()
def fill(net: Net, numbers: Tensor) -> None:
    """Weights := start + numbers, float32 [net.size], each weight in its own dtype."""
    at = 0
    for name, parameter in net.parameters():
        own = numbers[at : at + parameter.numel()].view(parameter.shape).to(parameter.device)
        parameter.copy_(net.base[name].float() + own)
        at += parameter.numel()


@torch.no_grad()
def change(net: Net) -> Tensor:
    """How far the weights are from the start: float32 [net.size] on the CPU."""
    moved = [(p.float() - net.base[name].float()).flatten().cpu() for name, p in net.parameters()]
    return torch.cat(moved)


def digest(net: Net) -> str:
    """A hash (16 hex digits) of a net as it was loaded: its start weights, and the frozen ones; hollow or not."""
    found = hashlib.sha256()
    absorb(found, ((name, net.base[name]) for name in sorted([*net.names, *net.personal])))
    frozen = sorted(((n, p) for n, p in net.model.named_parameters() if not p.requires_grad), key=itemgetter(0))
    absorb(found, ((n, net.base[n] if p.is_meta else p) for n, p in frozen))
    return found.hexdigest()[:16]
