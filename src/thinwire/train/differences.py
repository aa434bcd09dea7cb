"""A gradient without a way back: central differences of the loss along random directions of what is trained.

    g = 1/P sum_p (L(v + eps z_p) - L(v - eps z_p)) / (2 eps) z_p          z_p of +1 and -1, d of them, from a key

Its mean is the gradient, up to eps^2 (Spall 1992, SPSA), and its mean square (P + d - 1) / P times the gradient's: what
P probes find has about the cosine sqrt(P / (P + d - 1)) with it. Memory is that of inference, whatever is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from thinwire.keys import Key


class Differences(NamedTuple):
    """So many probes a step, of size `eps` in every number, along directions from a key."""

    probes: int
    eps: float
    key: Key

    @torch.no_grad()
    def find(self, parameters: Sequence[nn.Parameter], step: int, loss: Callable[[], Tensor]) -> Tensor:
        """The probes' mean loss; if that is finite, each parameter's .grad is then the estimate. They end as before."""
        starts = [parameter.detach().clone() for parameter in parameters]
        sums, losses = [torch.zeros_like(start, dtype=torch.float32) for start in starts], list[Tensor]()
        for probe in range(self.probes):
            signs = _signs(self.key.fold(step, probe), parameters)
            for side in (1, -1):
                for parameter, start, sign in zip(parameters, starts, signs, strict=True):
                    parameter.copy_(start.float().add(sign, alpha=side * self.eps))
                losses.append(loss().double().cpu())
            slope = float(losses[-2] - losses[-1]) / (2 * self.eps * self.probes)
            for total, sign in zip(sums, signs, strict=True):
                total.add_(sign, alpha=slope)
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.copy_(start)
        mean = torch.stack(losses).mean()
        if torch.isfinite(mean):
            for parameter, total in zip(parameters, sums, strict=True):
                parameter.grad = total.to(parameter.dtype)
        return mean


def cosine(probes: int, size: int) -> float:
    """What the estimate of so many probes along `size` numbers is expected to have with the gradient."""
    return math.sqrt(probes / (probes + size - 1))


def _signs(key: Key, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """+1 and -1, a bit each, float32 in the shapes of the parameters."""
    counts = [parameter.numel() for parameter in parameters]
    words = key.words(-(-sum(counts) // 64))
    bits = np.unpackbits(words.view(np.uint8), count=sum(counts), bitorder="little")
    drawn = torch.from_numpy(np.where(bits, np.float32(1), np.float32(-1)))
    return [
        part.view(parameter.shape).to(parameter.device)
        for part, parameter in zip(drawn.split(counts), parameters, strict=True)
    ]
