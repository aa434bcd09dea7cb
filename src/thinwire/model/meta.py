"""A model without memory for its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def hollow(make: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """What `make` makes of the config, with its parameters on the meta device and its buffers real; in eval mode.

    It takes no memory for weights, and leaves the config and the global generators as they are.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    config.use_cache = False
    with init_empty_weights(include_buffers=False), _EmptyOnMeta(), torch.random.fork_rng(devices=[]):
        model = make(config)
    model.tie_weights()  # moving a parameter to the meta device has made a new one of it
    ready: PreTrainedModel = model.eval()
    return ready


class _EmptyOnMeta(TorchFunctionMode):
    """Inside, torch.empty allocates nothing, and so whatever initialises its result takes no time."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **((kwargs or {}) | ({"device": "meta"} if function is torch.empty else {})))
