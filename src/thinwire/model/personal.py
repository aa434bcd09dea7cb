"""What a client alone has of a net's trained parameters: put in place for its visit, and out of the way after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from thinwire.model.net import Net

PREFIX = "kept/"  # of the names that they have in a client's memory


@contextlib.contextmanager
def at_home(net: Net, memory: MutableMapping[str, Tensor], remember: bool) -> Iterator[None]:
    """Within, the net's personal parameters are those in the memory, or the start's for a client that has none.

    Afterwards they are the start's again, which a server evaluates with. `remember`: the memory then has them as they
    were left; not where the visit has failed.
    """
    if not net.personal:
        yield
        return
    _fill(net, memory)
    try:
        yield
        if remember:
            memory.update({PREFIX + name: p.detach().cpu().clone() for name, p in net.personal.items()})
    finally:
        _fill(net, {})


@torch.no_grad()
def _fill(net: Net, memory: Mapping[str, Tensor]) -> None:
    found = {name: memory.get(PREFIX + name) for name in net.personal}
    whole = all(t is not None and t.shape == net.personal[n].shape for n, t in found.items())
    for name, parameter in net.personal.items():
        own = found[name]
        parameter.copy_(own if whole and own is not None else net.base[name])
