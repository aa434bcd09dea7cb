"""Error feedback (Karimireddy et al., 2019, arXiv:1901.09847): what a code loses is kept, and added to what comes next.

    c = Q(x + e)        e <- x + e - c

Over all messages, the sum of what was sent plus what is owed is the sum of what was learned. It is so to the bit: all
three are multiples of 2^-40 below 2^12, which float64 adds without rounding. Where only a share of a debt is carried
over, the rest is given up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thinwire.compress.catalogue import Code

GRID = 2.0**40
DEBT = "debt"  # its name in a client's memory


def on_grid(x: Tensor) -> Tensor:
    """The nearest multiples of 2^-40, float64."""
    return (x.double() * GRID).round_().div_(GRID)


def encode_with_debt(code: Code, x: Tensor, debt: Tensor, key: int) -> tuple[bytes, Tensor, Tensor]:
    """The bytes of x + debt, what they decode to (float32), and what is owed then (float64), all of x's shape.

    ValueError unless x is finite.
    """
    wanted = on_grid(x) + debt
    data = code.encode(wanted.float(), key)
    sent = code.decode(data, x.shape, key)
    return data, sent, wanted - on_grid(sent)


def carried(debt: Tensor, share: float) -> Tensor:
    """What is left of a debt of which a `share` is carried over; all of it is the debt itself."""
    return debt if share == 1 else on_grid(debt * share)


def debt_of(memory: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """What a client's memory has as its debt of numbers like these; 0 where it has none."""
    debt = memory.get(DEBT)
    if debt is not None and debt.dtype == torch.float64 and debt.shape == like.shape:
        return debt
    return torch.zeros(like.shape, dtype=torch.float64)
