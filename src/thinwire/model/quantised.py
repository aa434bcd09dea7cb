"""Models whose linear layers are kept in 8 or 4 bits, by bitsandbytes, and where their parts lie.

Only with such a model is bitsandbytes imported, or peft, which imports it.
"""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thinwire.model.errors import ModelError
from thinwire.model.meta import hollow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = ["lm_head", "embed_out", "score", "classifier"]  # stay as they are in a quantised model


def placed_on(device: str, bits: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained is given where the model is not simply read into the CPU's memory: it spans all GPUs, or its
    linear layers are to be quantised. ModelError: bitsandbytes is not installed."""
    if bits is None:
        return {"device_map": "auto"} if device == "auto" else {}
    if find_spec("bitsandbytes") is None:
        raise ModelError("model.bits: a quantised model needs bitsandbytes: pip install 'thinwire[bits]'")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=HEADS
        )
    return {"device_map": "auto" if device == "auto" else {"": device}, "quantization_config": how}


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """The quantised layers of a model by name; none where it is in floats."""
    if getattr(model, "hf_quantizer", None) is None:
        return {}
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def floats(layer: nn.Module) -> Tensor:
    """The weight that a quantised layer computes with, [out, in]."""
    from peft.utils.integrations import dequantize_module_weight

    found: Tensor = dequantize_module_weight(layer)
    return found


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """What writes a state in floats: the model, or without memory one like it that is not quantised."""
    if not quantised_layers(model):
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    empty = hollow(partial(type(model)._from_config, dtype=model.dtype), config)
    if model.can_generate():
        empty.generation_config = model.generation_config
    return empty
