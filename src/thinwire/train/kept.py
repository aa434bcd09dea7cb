"""An optimiser's moments, from visit to visit of a client."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

MOMENTS = "moments/"  # what begins their names in a client's memory


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
