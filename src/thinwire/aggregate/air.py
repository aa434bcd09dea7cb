"""A round's sum over the air, simulated: all clients send at once, and the receiver has the sum and its noise.

Client k counts p_k = w_k / sum_j w_j. Of a tensor it sends u_k, by how much it has changed in its visit, through a
channel of gain h_k that it knows; m_k and s_k, mean and standard deviation of u_k, travel beside it as numbers:

    client k   b_k (u_k - m_k) / s_k                               of each number, |b_k|^2 <= P in the mean
    receiver   y = sum_k h_k b_k (u_k - m_k) / s_k + z             z of variance N + J
    forcing    b_k = sqrt(eta) p_k s_k / h_k                       eta = P min_k |h_k|^2 / (p_k s_k)^2
    estimate   y / sqrt(eta) + sum_k p_k m_k = sum_k p_k u_k + z / sqrt(eta)

so the channel is undone, and what is left is the weighted mean and an error, independent for each number, of variance

    (N + J) / eta = (10^(-snr / 10) + 10^(jam / 10)) max_k (p_k s_k)^2 / |h_k|^2

The client in the deepest fade or with the longest update sets it for all, without a bound: `clipped`, with
`then = "air"`, bounds updates first. N is the receiver's noise and J a jammer's, both beside P in decibels; |h_k|^2
follows Rayleigh's law, one draw a client and round, exponential of mean 1. Here the mean is taken as ever and the error
is drawn beside it, all from the round's key. It is a simulation: what travels are the frames of any other run, and
their bytes, not a channel's uses, are what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.aggregate.mean import Aggregation, Mean, Metrics, Setting, Update


class Air(Aggregation):
    """The weighted mean as one fading channel gives it; `noise` in the records is its error's deviation a number."""

    kind: Literal["air"] = "air"
    snr: float = Field(20.0, ge=-100)  # dB: P over the receiver's noise; beyond 150 float32 shows none
    jam: float | None = Field(None, ge=-200, le=100)  # dB: a jammer's power over P; None: there is none
    fading: Literal["rayleigh", "none"] = "rayleigh"

    def __call__(
        self, updates: Iterable[tuple[int, Update]], at: Setting | None = None
    ) -> tuple[dict[str, Tensor], Metrics]:
        """The mean with its error, float32, by name; ValueError without a key to draw from."""
        if at is None or at.key is None:
            raise ValueError("the channel is drawn from a round's key")
        key, totals, worst, gains = at.key.fold("air"), dict[str, float](), dict[str, float](), list[float]()

        def received() -> Iterator[tuple[int, Update]]:
            for client, update in updates:
                gain = self.gain(float(key.fold("gain", client).uniform(1)[0]))
                gains.append(gain)

                def note(name: str, tensor: Tensor, weight: float = update.weight, gain: float = gain) -> None:
                    totals[name] = totals.get(name, 0.0) + weight
                    need = (weight * spread(tensor, at.origin.get(name))) ** 2 / gain
                    worst[name] = max(worst.get(name, 0.0), need)

                yield client, update._replace(tensors=_Noted(update.tensors, note))

        mean, metrics = Mean()(received(), at)
        squares, count = 0.0, 0
        for name, tensor in mean.items():
            variance = self.noise * worst[name] / totals[name] ** 2
            if variance:
                error = key.fold("noise", name).numpy().standard_normal(tuple(tensor.shape), "float32")
                tensor.add_(torch.from_numpy(error).to(tensor.device), alpha=math.sqrt(variance))
            squares, count = squares + variance * tensor.numel(), count + tensor.numel()
        if not mean:
            return mean, metrics
        return mean, metrics | {"noise": math.sqrt(squares / count), "weakest": min(gains)}

    @property
    def noise(self) -> float:
        """(N + J) / P."""
        return 10 ** (-self.snr / 10) + (0.0 if self.jam is None else 10 ** (self.jam / 10))

    def gain(self, uniform: float) -> float:
        """|h|^2 of a client, by a number uniform on [0, 1): never 0."""
        return max(-math.log1p(-uniform), 2.0**-60) if self.fading == "rayleigh" else 1.0


def spread(tensor: Tensor, origin: Tensor | None) -> float:
    """The standard deviation of a tensor's numbers, or of what they have changed by, about their mean."""
    change = tensor.float() if origin is None else tensor.float() - origin.to(tensor.device).float()
    return float(change.double().std(correction=0))


class _Noted(Mapping[str, Tensor]):
    """Tensors that are looked at when they are read, which is once: large ones are not decoded twice."""

    def __init__(self, tensors: Mapping[str, Tensor], note: Callable[[str, Tensor], None]) -> None:
        self._tensors, self._note = tensors, note

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._note(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
