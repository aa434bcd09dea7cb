"""The head of a classifier: the parameters after its transformer, fresh ones drawn from a key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from thinwire.keys import Key


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether the model names classes of whole texts."""
    return type(model).__name__.endswith("ForSequenceClassification")


def of_head(model: PreTrainedModel, name: str) -> bool:
    """Whether the parameter of that name is of a classifier's head: outside the transformer."""
    return not name.startswith(f"{model.base_model_prefix}.")


def drawn(model: PreTrainedModel, names: Iterable[str], key: Key) -> dict[str, Tensor]:
    """Fresh values for parameters that a classifier's files lack, float32 on the CPU, the same wherever it is done.

    Matrices are uniform with the deviation that the model's config has for fresh weights, biases 0, scales of norms 1.
    ModelError: one of them is within the transformer, which is never drawn (a pooler may be).
    """
    found = {}
    for name in names:
        if not of_head(model, name) and ".pooler." not in name:
            raise ModelError(f"the weights lack tensors that the model needs, such as {name}")
        parameter = model.get_parameter(name)
        deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
        if parameter.ndim > 1:
            uniform = torch.from_numpy(2 * key.fold(name).uniform(parameter.numel()) - 1).view(parameter.shape)
            found[name] = (deviation * 3**0.5 * uniform).float()
        else:
            found[name] = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
    return found
