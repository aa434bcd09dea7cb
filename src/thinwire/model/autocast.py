"""Matrix products of a float32 model in bfloat16, where the processor has such products: its weights stay as they are.

A CPU with AMX or AVX512-BF16 multiplies bfloat16 numbers several times as fast as float32 ones. torch.autocast rounds
the operands of a product and keeps everything else: weights, gradients of weights, moments, norms, softmax and losses.
What does not gain is left as it is: torch's attention takes longer for its gradient in bfloat16 than in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

ATTRIBUTE = "thinwire_autocast"  # of a model whose products are rounded
SHORT = 256  # positions up to which the gradient of attention in bfloat16 takes a CPU longer than that in float32


def has_products(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers faster than float32 ones: a CPU with AMX or AVX512-BF16, a GPU."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def round_products(model: nn.Module, rounded: bool) -> None:
    """Let a float32 model's products be in bfloat16, or no longer; without effect where its device has none."""
    setattr(model, ATTRIBUTE, rounded)


def are_rounded(model: nn.Module) -> bool:
    """Whether `round_products` was asked for."""
    return cast("bool", getattr(model, ATTRIBUTE, False))


@contextmanager
def passes(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The context in which passes of a model on that device are computed."""
    rounded = are_rounded(model) and has_products(device)
    short = _Attention() if rounded and device.type == "cpu" and torch.is_grad_enabled() else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=rounded), short:
        yield


class _Attention(TorchFunctionMode):
    """Computes short attention of bfloat16 numbers that is to have a gradient in float32, and rounds what it gives."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if function is not F.scaled_dot_product_attention or args[0].dtype != torch.bfloat16:
            return function(*args, **options)
        query, key, value, *rest = args
        if key.shape[-2] > SHORT:
            return function(*args, **options)
        mask = options.get("attn_mask")
        if mask is not None and mask.dtype == torch.bfloat16:
            options["attn_mask"] = mask.float()
        with torch.autocast("cpu", enabled=False):
            return function(query.float(), key.float(), value.float(), *rest, **options).to(torch.bfloat16)
