"""The law tied: K directions that have no entry in common, by the map of the tied view (model.views.ties).

    z_j[i] = sqrt(K) sign[i] where index[i] = j, and else 0

Each entry belongs to one direction, so sum_j c_j z_j is one pass over the weights whatever K is: a look-up of
sqrt(K) c_j. Over the K directions an entry's mean square is 1, as by the other laws, and |z|^2 is about as large as
theirs: learning rates and steps of probes keep their meaning. A probe moves one weight in K, by sqrt(K) times as much.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.model.views.ties import Ties


def accumulate(
    ties: Ties,
    weight: Tensor,
    out: Tensor,
    stream: int,
    seeds: NDArray[np.uint64],
    coefs: NDArray[np.floating],
    scale: float,
) -> None:
    """out = scale weight + sum_k coefs[k] z_{seeds[k]}, as Directions.apply has it, of the tensor with that stream.

    In weights that are shorter than float32 a scale other than 1 takes a float32 copy of them.
    """
    if seeds.size and int(seeds.max()) >= ties.numbers:
        raise ValueError(f"direction {int(seeds.max())} is not in a pool of {ties.numbers}")
    table = np.bincount(seeds.astype(np.int64), coefs.astype(np.float64), ties.numbers) * math.sqrt(ties.numbers)
    start = weight
    if scale != 1 and weight.dtype.itemsize >= 4:
        start = torch.mul(weight, scale, out=out)
    elif scale != 1:
        start = weight.float() * scale
    if not seeds.size:
        out.copy_(start)
    elif weight.dtype == torch.float64:
        index, sign = ties.signed(stream, weight.numel())
        out.copy_(start + torch.from_numpy(sign * table[index]).view(weight.shape).to(weight.device))
    else:
        ties.spread(torch.from_numpy(table).float(), stream, start, out)


def direction(ties: Ties, stream: int, count: int, seed: int) -> NDArray[np.float32]:
    """z_seed of a small tensor: float32 [count]."""
    index, sign = ties.signed(stream, count)
    found: NDArray[np.float32] = np.where(index == seed, sign * np.float32(math.sqrt(ties.numbers)), np.float32(0))
    return found
