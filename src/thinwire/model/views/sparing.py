"""What a factor need not keep for the way back, as autograd can make it again of what it keeps in any case.

A factor that is trained keeps the input of its layer. Of the last layer of a gated MLP that is act(g) u, and for this
product g, act(g) and u are kept: with the factor four matrices as wide as the MLP, more than all else in a layer. Here
only g and u are; act(g) and act(g) u are computed again, by the same operations, so to the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

ACTIVATIONS = {
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}
"""By the name of autograd's node: what it has computed, of what it keeps."""


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), where x, if it is such a product, is not kept for the gradient of the layer's weight."""
    product: Any = x.grad_fn
    found: Tensor
    if product is None or not spare(product):
        found = layer(x)
        return found
    here, size = x.data_ptr(), x.numel()

    def pack(tensor: Tensor) -> Any:
        return tensor.shape if (tensor.data_ptr(), tensor.numel()) == (here, size) else tensor

    def unpack(kept: Any) -> Tensor:
        # the node that made x has not run yet, and still has what it keeps
        again: Tensor = product._saved_self * product._saved_other if isinstance(kept, torch.Size) else kept
        return again.view(kept) if isinstance(kept, torch.Size) else again

    with saved_tensors_hooks(pack, unpack):
        found = layer(x)
    return found


def spare(product: Any) -> bool:
    """Whether this node is such a product; its activation is then no longer kept."""
    if product.name() != "MulBackward0":
        return False
    for which, (node, _) in zip(("self", "other"), product.next_functions, strict=True):
        if node is not None and node.name() in ACTIVATIONS:
            return _made_again(getattr(product, f"_raw_saved_{which}"), node)
    return False


def _made_again(kept: Any, node: Any) -> bool:
    """What is kept is from now on made by that node's operation; False: others see to it."""
    try:
        kept.register_hooks(lambda _: None, lambda _: ACTIVATIONS[node.name()](node))
    except RuntimeError:  # there are hooks: the whole layer is computed again, or this was here before
        return False
    return True
