"""How much of updates a codec carries, beside what nothing carries: the controls that a codec must beat.

cosine      of an update with its own decoding
error       |decoded - x|^2 / |x|^2; 1 for a decoder whose answer is always zero
shifted     cosine of an update with the decoding of another client's code: near the cosine of the updates themselves
            where a codec is honest, and near `cosine` where a decoder ignores what it is given
mean        cosine of the clients' mean with the mean of the decodings
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.compress.catalogue import Code


@dataclass(frozen=True)
class Fidelity:
    """Averages over updates, or over rounds; `bytes` of a code."""

    cosine: float
    error: float
    shifted: float
    mean: float
    bytes: float


def fidelity(code: Code, rounds: Sequence[Sequence[Tensor]]) -> Fidelity:
    """Of a codec on the updates of several clients, two at least, in each of some rounds."""
    found, key = list[tuple[float, ...]](), 0
    means: list[float] = []
    for updates in rounds:
        coded = [code.encode(x, key + i) for i, x in enumerate(updates)]
        decoded = [code.decode(data, x.shape, key + i) for i, (data, x) in enumerate(zip(coded, updates, strict=True))]
        key += len(updates)
        for i, x in enumerate(updates):
            y = decoded[i]
            error = float((y - x).square().sum() / x.square().sum())
            found.append((cosine(x, y), error, cosine(x, decoded[i - 1]), len(coded[i])))
        means.append(cosine(torch.stack(list(updates)).mean(0), torch.stack(decoded).mean(0)))
    average = [sum(column) / len(found) for column in zip(*found, strict=True)]
    return Fidelity(average[0], average[1], average[2], sum(means) / len(means), average[3])


def cosine(x: Tensor, y: Tensor) -> float:
    """Of two tensors; 0 where one is zero."""
    lengths = float(x.norm()) * float(y.norm())
    return float((x * y).sum()) / lengths if lengths > 0 else 0.0
