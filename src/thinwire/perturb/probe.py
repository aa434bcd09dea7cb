"""The two-sided probe L(w + eps z), L(w - eps z), which never writes to the weights.

Each module that owns parameters is given perturbed copies of them just before its own forward pass, in one scratch
buffer that all modules share, and its own tensors back just after. So the weights are bit-identical after a probe in
every dtype, and the memory above plain inference is that of the largest single module. It rests on a parameter being
used only within the forward pass of a module that owns it, which Hugging Face models keep to; `Probe` refuses a model
one of whose perturbed parameters no forward pass has met.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.data.batch import Batch
from thinwire.model.flat import Net
from thinwire.perturb.directions import Directions
from thinwire.train.objective import loss


class Probe:
    """A context in which `losses` may be called; leaving it removes every trace from the model."""

    def __init__(self, net: Net, directions: Directions) -> None:
        self.net, self.directions = net, directions
        self._names = {id(parameter): name for name, parameter in net.parameters()}
        self._held: list[tuple[nn.Parameter, Tensor]] = []  # parameters that now show a perturbed copy
        self._met: set[str] = set()
        self._seed, self._step = 0, 0.0
        self._stack = ExitStack()
        owners = [(module, self._own(module)) for module in net.model.modules()]
        self._owners = [(module, own) for module, own in owners if own]
        # Modules that hold others keep their copies while those run, so only the leaves can share one buffer.
        leaves = [own for module, own in self._owners if not any(module.children())]
        most = max((sum(p.numel() for p in own) for own in leaves), default=0)
        like = self._owners[0][1][0]
        self._scratch = torch.empty(most, dtype=like.dtype, device=like.device)

    def _own(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters(recurse=False) if id(p) in self._names]

    def __enter__(self) -> Probe:
        for module, own in self._owners:
            leaf = not any(module.children())
            before = module.register_forward_pre_hook(lambda m, a, own=own, leaf=leaf: self._perturb(own, leaf))
            after = module.register_forward_hook(lambda m, a, out, own=own: self._restore(len(own)))
            self._stack.callback(before.remove)
            self._stack.callback(after.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self._stack.close()

    @torch.no_grad()
    def losses(self, batch: Batch, seed: int, eps: float) -> tuple[float, float]:
        """(L(w + eps z), L(w - eps z)) for direction z of `seed`; not finite where the model's loss is not."""
        found = []
        self._seed = seed
        try:
            for self._step in (eps, -eps):
                found.append(float(loss(self.net.model, batch)))
        finally:
            self._restore(len(self._held))  # what a forward pass that failed has left
        if len(self._met) < len(self._names):
            missed = sorted(set(self._names.values()) - self._met)
            raise RuntimeError(f"no forward pass met {missed[0]} (of {len(missed)}): this model cannot be probed")
        return found[0], found[1]

    def _perturb(self, own: list[nn.Parameter], leaf: bool) -> None:
        offset = 0
        for parameter in own:
            weight, name = parameter.data, self._names[id(parameter)]
            self._met.add(name)
            if leaf and weight.dtype == self._scratch.dtype:
                out = self._scratch[offset : offset + weight.numel()].view(weight.shape)
                offset += weight.numel()
            else:
                out = torch.empty_like(weight)
            self._held.append((parameter, weight))
            parameter.data = self.directions.apply(weight, name, [self._seed], [self._step], out=out)

    def _restore(self, count: int) -> None:
        for _ in range(count):
            parameter, weight = self._held.pop()
            parameter.data = weight
