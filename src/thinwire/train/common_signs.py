"""Signs under scales that all clients of a round have in common, so that they can be added up: see aggregate.linear.

A client codes c = s sign(x + e) with the scales s that came down, and keeps e <- x + e - c. What travels are bits,
whose sums over n clients are at most n, and beside them the scales that the client's own x + e would have: their mean
are the next round's s. In the first round they are 0: nothing moves, and all that was learnt is owed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thinwire.aggregate.linear import Linear
from thinwire.aggregate.mean import Update
from thinwire.compress.catalogue import TensorCode
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import to_bytes
from thinwire.compress.feedback import on_grid
from thinwire.errors import ConfigError
from thinwire.privacy.secure import Secure
from thinwire.privacy.terms import Term
from thinwire.wire import Illegal

SCALES = "scales"
FINE = 1 << 30  # of a unit of a scale, which is 2 at most


def encode(code: TensorCode, x: Tensor, debt: Tensor, scales: Tensor) -> tuple[bytes, Tensor, Tensor]:
    """The bytes of x + debt under scales bfloat16 [blocks]; the scales of its own, float32; the debt then, float64.

    Illegal for scales of another number of blocks, or that are none.
    """
    assert isinstance(code, Blocks)
    wanted = on_grid(x) + debt
    own, codes = code.rounded(wanted.float(), 0)
    if scales.dtype != torch.bfloat16 or scales.shape != own.shape:
        raise Illegal(f"common scales are {scales.dtype} {list(scales.shape)}, not bfloat16 {list(own.shape)}")
    data = code.join(scales.view(torch.uint16).numpy(), codes)
    try:
        sent = code.decode(data, x.shape, 0)
    except ValueError as error:
        raise Illegal(f"common scales: {error}") from None
    return data, torch.from_numpy(own.copy()).view(torch.bfloat16).float(), wanted - on_grid(sent)


class CommonSigns(Linear):
    """The mean of clients' signs, times the scales, by the name of the method's `numbers`."""

    def __init__(self, method: Any, secure: Secure, code: TensorCode, numbers: str) -> None:
        super().__init__(method, secure)
        self.numbers = numbers
        if not isinstance(code, Blocks) or code.bits != 1:
            raise ConfigError("method.code: must be signs under privacy.secure: bits are what is added up")
        if method.weighting != "uniform":
            raise ConfigError(
                'method.weighting: must be "uniform" under privacy.secure: a sign has no room for a weight'
            )
        if isinstance(method.gradient, dict):
            raise ConfigError("method.gradient: must be one for all under privacy.secure, where all count alike")
        self.code = code

    def _blocks(self, count: int) -> int:
        return -(-count // self.code.block)

    def extra_bytes(self, net: Any) -> int:
        """Its scales, and their place in the header."""
        return 2 * self._blocks(net.size) + 64

    def begun(self, state: Any) -> Any:
        """With scales: of 0 before there are any."""
        blocks = self._blocks(state.numbers.numel())
        return state if state.scales is not None else replace(state, scales=torch.zeros(blocks, dtype=torch.bfloat16))

    def terms(self, net: Any) -> Mapping[str, Term]:
        """A bit a number, and a scale a block."""
        return {
            self.numbers: Term((net.size,), 1.0, 0, 1),
            SCALES: Term((self._blocks(net.size),), 1 / FINE, 0, 2 * FINE),
        }

    def parts(self, down: Any, up: Any, client: Any) -> Mapping[str, Tensor]:
        """The codes, 0 or 1, and the client's own scales."""
        _, codes = self.code.split(to_bytes(up.change), client.net.size)
        return {self.numbers: torch.from_numpy(codes), SCALES: up.scales}

    def of_terms(self, state: Any, server: Any, mean: Mapping[str, Tensor]) -> Update:
        """The numbers' mean, and the next scales, float32."""
        count = state.numbers.numel()
        scales = state.scales.double().repeat_interleave(self.code.block)[:count]
        return Update(
            {self.numbers: ((2 * mean[self.numbers] - 1) * scales).float(), SCALES: mean[SCALES].float()}, 1.0
        )


def next_scales(mean: Mapping[str, Tensor]) -> Tensor | None:
    """What a state keeps of the mean scales, bfloat16; None outside rounds of masked replies."""
    return mean[SCALES].to(torch.bfloat16) if SCALES in mean else None
