"""Bytes of coded differences of weights, from the rate and the steps as measured in LOG.md."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from thinwire.compress.catalogue import TensorCode, sizes
from thinwire.compress.codecs.topk import TopK
from thinwire.costs.frames import Expected, Frames, Span


def coded_bits(
    lr: float, steps: int, optimiser: str, dtype: torch.dtype, stochastic: bool = True
) -> tuple[float, float]:
    """From the fewest to the most bits a weight that a local visit's exact difference takes.

    A weight moves by about lr sqrt(steps) under AdamW. In bfloat16 that took 0.50 bits at 4e-5, 0.56 at 4.5e-5 and 1.9
    at 3.2e-4 with stochastic rounding, and about 0.6 of it without (LOG.md): bits = 0.52 (move / 4.2e-5)^0.62, to
    within a factor of two on either side. Each further bit of the dtype's mantissa is one more to code.
    """
    whole = 8.0 * dtype.itemsize
    if optimiser != "adamw":
        return 0.01, whole
    bits = 0.52 * (lr * math.sqrt(steps) / 4.2e-5) ** 0.62 * (1.0 if stochastic else 0.6)
    bits += {torch.bfloat16: 0, torch.float16: 3, torch.float32: 16}[dtype]
    return bits / 2, min(whole, bits * 2)


def codes(code: TensorCode, trained: Mapping[str, Tensor], gated: bool) -> Span:
    """The bytes of all tensors' codes; top-k's positions are entropy-coded, and what is gated has none."""
    spans = [sizes(code, tensor.shape) for tensor in trained.values()]
    least = 0 if gated and isinstance(code, TopK) else sum(least for least, _ in spans)
    return Span(least, sum(most for _, most in spans))


def differences(
    at: Expected,
    heads: tuple[int, int],
    dtype: torch.dtype,
    bits: tuple[float, float],
    lossy: tuple[Span, Span] | None,
    sent: bool,
) -> Frames:
    """Coded differences both ways: down what the server has moved by since a client was there, up a visit's.

    `heads`: bytes of frames without a code; `bits`: a weight's in an exact difference; `lossy`: bytes of a step's codes
    where they are not exact, both (down, up). `sent`: a newcomer is sent the whole model, coded.
    """
    values = sum(t.numel() for t in at.trained.values())
    slack = 15 * len(at.trained)  # digits of each tensor's length, and what the coder puts in front of it
    # without an old one a bfloat16 weight takes 10.6 bits; mantissas of others do not get shorter
    whole = {torch.bfloat16: 10.6, torch.float16: 13.5, torch.float32: 26.6}[dtype]

    def coded(head: int, low: float, high: float) -> Span:
        return Span(head + low * values / 8, head + 4 * slack + high * values / 8)

    def step(up: int) -> Span:
        """The server's step of one round (0), or a client's (1)."""
        if lossy is None:
            return coded(heads[up], *bits)
        return Span(heads[up] + lossy[up].least - slack, heads[up] + lossy[up].most + 4 * slack)

    def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
        up = step(1)
        if new and sent:
            return coded(heads[0], 0.85 * whole, 8.0 * dtype.itemsize), up
        if round == 1:
            return Span(heads[0] - 40 * len(at.trained), heads[0] + 4 * slack), up
        if lossy is not None and not new and client in at.cohorts[round - 2]:
            return step(0), up
        rounds = round - 1 if new else 1  # a newcomer is sent all that has happened
        # who was away is sent the exact difference of two versions, whatever the codec
        return coded(heads[0], bits[0] / 2, bits[1] * rounds**0.5), up

    return frames
