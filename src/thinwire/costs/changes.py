"""Bytes of numbers whose last coded changes are kept for those who missed them, or travel whole where that is less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from thinwire.compress.catalogue import TensorCode, sizes
from thinwire.costs.frames import VERSION, Expected, Frames, Span


def kept_changes(
    at: Expected,
    codes: Sequence[TensorCode],
    merge_every: int,
    kept: int,
    step: Callable[..., Any],
    reply: Callable[[int, torch.Tensor, int], Any],
) -> Frames:
    """The frames of a method that sends such changes under `codes`: up, down, and of the numbers whole.

    `kept`: changes at most; every `merge_every` rounds there is an empty one more, and a stage. The payloads are
    `step(base, changes, merges, levels, stages)`, whose last two are there where the numbers travel whole, None and 0
    otherwise; and `reply(client, code, examples)`.
    """
    shape = (sum(tensor.numel() for tensor in at.trained.values()),)

    def merged(round: int) -> int:
        return (round - 1) // merge_every if merge_every else 0

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        seen, held = [n for n in range(1, round) if client in at.cohorts[n - 1]], at.examples[client]
        first, there, back = 1 if new else seen[-1], list[int](), list[int]()
        missed, over, merges = round - first, merged(round), merged(round) - merged(first)
        for end in (0, 1):
            up, change, levels = (torch.empty(int(sizes(code, shape)[end]), dtype=torch.uint8) for code in codes)
            down = step(None, [], 0, levels, over)
            if missed + merges <= kept and missed * change.numel() <= (1 + over) * levels.numel():
                down = step(None if new else VERSION, [change] * missed, merges, None, 0)
            there.append(at.length(down, round, client))
            for examples in (1, 65535) if held is None else (held,):
                back.append(at.length(reply(client, up, examples), round, client, VERSION))
        return Span(min(there), max(there)), Span(min(back), max(back))

    return frames
