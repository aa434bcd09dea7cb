"""Factors that go into the weights beside which they stand, and begin anew as another key draws them.

    W <- W + scale B A        or, with a core between them, W + scale B C A

in float64, each sum in the order of the rank, rounded once, to W's dtype: the same bits on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from thinwire.aggregate.products import Pair, add_outer, added
from thinwire.keys import Key
from thinwire.model.views import factors, tying


def moved(layer: factors.Factored, weight: Tensor) -> Tensor:
    """The weight with the layer's product added, on the CPU."""
    left, rows, *core = (factor.weight.detach().cpu() for factor in layer.factors)
    rows = rows.T
    for square in core:
        product = torch.zeros((square.shape[1], rows.shape[1]), dtype=torch.float64)
        add_outer(square.double().contiguous().numpy(), rows.double().contiguous().numpy(), product.numpy())
        rows = product
    turned = isinstance(layer.base_layer, Conv1D)
    scales = torch.full((len(left),), layer.scale, dtype=torch.float64)
    found = added(weight.T if turned else weight, Pair(left, rows), scales)
    return (found.T if turned else found).contiguous()


@torch.no_grad()
def redraw(model: PreTrainedModel, key: Key) -> None:
    """Factors, and what ties them to numbers, are what a view of this key would have put into the model."""
    for name in factors.places(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, factors.Factored)
        held = [factor.weight for factor in layer.factors]
        begun = factors.drawn(key.fold(name), len(held[0]), layer.in_features, layer.out_features, len(held) > 2)
        for weight, start in zip(held, begun, strict=True):
            weight.copy_(start)
    if hasattr(model, tying.MODULE):
        tying.of(model).restart(key)
