"""Factors as plain pairs of matrices by the names of layers: taken from a model, put beside the layers of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thinwire.model.errors import ModelError
from thinwire.model.views.factors import Factored, sides

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pairs: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""A [rank, in] and B [out, rank] with the scale in it, float32 on the CPU, of each layer."""


def pairs(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer with factors; with a core, B C is the second."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Factored):
            left, right = (factor.float().cpu() for factor in layer.pair())
            found[name] = left, right * layer.scale
    return found


def place(model: PreTrainedModel, found: Pairs, about: str) -> None:
    """Put the pairs beside the layers of their names, in place. ModelError: the model has no such layer."""
    layers = dict(model.named_modules())
    for name, (left, right) in found.items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear | Conv1D) or sides(layer) != (left.shape[1], len(right)):
            raise ModelError(f"{about}: the base model has no linear layer {name} of {left.shape[1]} x {len(right)}")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Factored(layer, left, right, 1.0).eval())
