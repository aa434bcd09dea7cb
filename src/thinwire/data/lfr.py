"""LFR: learn, focus, review (Prakriya et al., 2024, arXiv:2409.06131): what is learnt is seen less, what is not, more.

A client's passes over its n rows are, in turn,

    learn, later review    over all rows
    focus                  over the ceil(focus n) rows of the highest loss, where answers are balanced: of each answer's

and what a row's loss was when it was last trained on is kept. It goes on from visit to visit: where a visit is shorter
than a pass, one visit learns, the next focuses, and so on. A row that has not been trained on yet counts as the least
learnt; rows that are alike come in a random order. Losses are those that training computes anyway, so they grow old
between visits, and a row whose answer is wrong stays among the highest: a review sees all.

What is kept stands in the client's memory, which stays with the client.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from thinwire.keys import Key

LOSSES, PASSES = "order/losses", "order/passes"  # float32 [n], NaN where there is none yet; how many passes have begun


class Learnt:
    """What a client's memory has of the losses of its `count` rows; of another number of rows it begins anew."""

    def __init__(self, memory: MutableMapping[str, Tensor], count: int) -> None:
        self.memory = memory
        kept = memory.get(LOSSES)
        if kept is None or kept.shape != (count,) or PASSES not in memory:
            memory[LOSSES], memory[PASSES] = torch.full((count,), math.nan), torch.tensor(0)

    def begin(self) -> bool:
        """Begin another pass; whether it focuses."""
        before = int(self.memory[PASSES])
        self.memory[PASSES] = torch.tensor(before + 1)
        return before % 2 == 1

    def hardest(self, groups: Sequence[Sequence[int]], share: float, key: Key) -> list[int]:
        """The rows of the highest losses, a share of each group, ascending."""
        losses = self.memory[LOSSES].nan_to_num(nan=math.inf, posinf=math.inf).tolist()
        draw = key.permutation(len(losses)).tolist()
        found: list[int] = []
        for group in groups:
            hard = sorted(group, key=lambda row: (-losses[row], draw[row]))
            found += hard[: math.ceil(share * len(group))]
        return sorted(found)

    def record(self, rows: Sequence[int], each: Tensor) -> None:
        """What these rows' losses are now."""
        losses = self.memory[LOSSES].clone()
        losses[list(rows)] = each.to(losses)
        self.memory[LOSSES] = losses
