"""Parameters of a model that follow a few numbers: written anew when these have moved, their gradients gathered.

`ties` has the map. Before a pass that finds other numbers than the last one did, each follower is written; on the way
back each follower's gradient is added to the numbers' as soon as it is there, and freed. So a backward pass takes one
tensor's gradient at a time, and an optimiser as many moments as there are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thinwire.keys import Key
from thinwire.model.errors import ModelError
from thinwire.model.views.ties import Ties

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULE = "tied"
NAME = f"{MODULE}.numbers"


class Tying(nn.Module):
    """The numbers, float32 [d], and who follows them. `base` has the followers' start where it is not kept here."""

    followers: dict[str, nn.Parameter]
    ties: Ties

    def __init__(self, numbers: int, key: Key, followers: Mapping[str, nn.Parameter], kept: bool) -> None:
        super().__init__()
        first = next(iter(followers.values()))
        self.numbers = nn.Parameter(torch.zeros(numbers, device="cpu" if first.is_meta else first.device))
        self.ties = _map(key, numbers)
        self.followers = dict(followers)  # a plain table: they are the model's own, and found under their own names
        self.base: Mapping[str, Tensor] = {n: p.detach().clone() for n, p in followers.items()} if kept else {}
        self._seen: Tensor | None = torch.zeros(numbers)
        for stream, parameter in enumerate(followers.values()):
            parameter.register_post_accumulate_grad_hook(self._gatherer(stream))

    def forward(self) -> Tensor:
        """The numbers on the CPU: as a module's pass, for what perturbs a module's parameters while it is called."""
        return self.numbers.detach().cpu().clone()

    @torch.no_grad()
    def restart(self, key: Key) -> None:
        """The followers, whose start is kept here, begin where they are, by another map; all numbers are 0."""
        self.ties = _map(key, len(self.numbers))
        for name, parameter in self.followers.items():
            self.base[name].copy_(parameter)
        self._seen = self.numbers.zero_().cpu().clone()

    @torch.no_grad()
    def follow(self) -> None:
        """Write the followers, unless they are what these numbers make of them."""
        numbers = self()
        if self._seen is not None and torch.equal(numbers, self._seen):
            return
        moved = bool(numbers.any())
        self._seen = None  # if this is interrupted, nothing half-new passes for whole
        for stream, (name, parameter) in enumerate(self.followers.items()):
            if moved:
                self.ties.spread(numbers, stream, self.base[name], parameter.data)
            else:
                parameter.data.copy_(self.base[name])  # to the bit: a sum would lose the sign of a zero
        self._seen = numbers

    def _gatherer(self, stream: int) -> Any:
        def gather(parameter: Tensor) -> None:
            if self.numbers.grad is None:
                self.numbers.grad = torch.zeros_like(self.numbers)
            assert parameter.grad is not None
            self.ties.collect(parameter.grad, stream, self.numbers.grad)
            parameter.grad = None

        return gather

    def before(self, model: nn.Module, args: Any) -> None:
        """What a forward pass of the model begins with."""
        self.follow()
        for parameter in self.followers.values():
            parameter.requires_grad_(torch.is_grad_enabled())


def tie(model: PreTrainedModel, numbers: int, key: Key, kept: bool) -> None:
    """Let every parameter that requires a gradient follow `numbers` of them, which are 0 and all that is trained.

    `kept`: where the followers start is kept beside them; else it is read from `Tying.base` when it is needed.
    """
    followers = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not followers:
        raise ModelError("model.view: there is nothing to tie: no parameter of the model is trainable")
    tying = Tying(numbers, key, followers, kept)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    setattr(model, MODULE, tying)
    model.register_forward_pre_hook(tying.before)


def _map(key: Key, numbers: int) -> Ties:
    return Ties(key.fold("ties").word(), numbers)


def of(model: nn.Module) -> Tying:
    """The model's."""
    found = getattr(model, MODULE)
    assert isinstance(found, Tying)
    return found
