"""How much the layers of a model, and the heads and channels in them, matter to it: what to drop or prune first.

All scores look at token ids without padding, int64 [rows, length] a batch, on which the model's own loss is that of
the next token, or a classifier's that of the class which the whole model finds likeliest: no labels are needed. They
leave the model, its modes and gradients, and the global generators as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.model.anatomy import Layout
from thinwire.model.classifier import is_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def influence(model: PreTrainedModel, layers: str, batches: Sequence[Tensor]) -> list[float]:
    """For each layer 1 - the mean cosine, over tokens, of the hidden states that enter and leave it.

    The block influence of ShortGPT (arXiv:2403.03853, eq. 1), each cosine in float32. layers: dotted path of their
    list. ValueError if there are no tokens.
    """
    stack = _layers(model, layers)
    sums = [0.0] * len(stack)

    def add(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _entering(args, kwargs), output if isinstance(output, Tensor) else output[0]
            sums[index] += float(F.cosine_similarity(before.float(), after.float(), dim=-1).double().sum())

        return hook

    handles = [layer.register_forward_hook(add(i), with_kwargs=True) for i, layer in enumerate(stack)]
    try:
        with _at_rest(model), torch.no_grad():
            for ids in batches:
                model(input_ids=ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return [1 - total / _positive(sum(ids.numel() for ids in batches)) for total in sums]


def perplexity(model: PreTrainedModel, layers: str, batches: Sequence[Tensor]) -> list[float]:
    """For each layer the mean loss of a next token when the layer gives back what it is given.

    The logarithm of the perplexity that Shortened LLaMA (arXiv:2402.02834) drops layers by. ValueError: there is no
    next token, or the model predicts none.
    """

    def bypass(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # the layer has run in vain, but so it need not be known what it returns beside its hidden states
        hidden = _entering(args, kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    found, targets = [], _targets(model, batches)
    for layer in _layers(model, layers):
        handle = layer.register_forward_hook(bypass, with_kwargs=True)
        try:
            with _at_rest(model), torch.no_grad():
                losses = [_loss(model, *batch) for batch in zip(batches, targets, strict=True)]
        finally:
            handle.remove()
        found.append(sum(float(total) for total, _ in losses) / _positive(sum(count for _, count in losses)))
    return found


def taylor(model: PreTrainedModel, layers: str, batches: Sequence[Tensor]) -> list[float]:
    """For each layer the sum over its weights of |w dL/dw|, the gradients of all batches' mean losses added first.

    The Taylor score of Shortened LLaMA (arXiv:2402.02834), in float32. ValueError as for `perplexity`.
    """
    products = _products(model, layers, batches)
    return [math.fsum(float(product.sum()) for product in layer.values()) for layer in products]


def groups(model: PreTrainedModel, layers: str, batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each layer the importance of its kv groups and of its MLP channels, float32 [groups] and [channels].

    A group's is the sum of |w dL/dw| over all that goes with it: its rows of query, key and value, with their biases,
    and its columns of the output; a channel's over its rows of gate and up and its column of down. First order and by
    element as in LLM-Pruner (arXiv:2305.11627, section 3.2). ValueError as for `perplexity`, or a layer whose class
    cannot be narrowed.
    """
    layout = Layout.of(model, layers)
    for layer in layout.layers:
        if not layer.parts:
            raise ValueError(f"a {layer.kind} cannot be narrowed, only dropped or kept whole")
    found = []
    for layer, products in zip(layout.layers, _products(model, layers, batches), strict=True):
        sums = {"heads": torch.zeros(layer.heads), "channels": torch.zeros(layer.channels)}
        for name, part in layer.parts.items():
            along = (
                products[name].movedim(part.axis, 0).flatten(1).sum(1) if products[name].ndim > 1 else products[name]
            )
            sums[part.of] += along.view(part.fused, -1, part.rows).sum((0, 2)).cpu()
        found.append((sums["heads"], sums["channels"]))
    return found


def drop(scores: Sequence[float], candidates: Sequence[int], count: int) -> tuple[int, ...]:
    """The `count` layers with the lowest scores among the candidates, ascending; of equals those that come first.

    ValueError: there are fewer candidates, or a score is not a number.
    """
    known = sorted(set(candidates))
    if not 0 <= count <= len(known):
        raise ValueError(f"{count} layers cannot be dropped out of {len(known)}")
    if any(math.isnan(scores[layer]) for layer in known):
        raise ValueError("the score of a layer is not a number")
    return tuple(sorted(sorted(known, key=lambda layer: scores[layer])[:count]))


def keep(importance: Tensor, share: float) -> tuple[int, ...]:
    """The indices that stay, ascending, when the lowest `share` of [n] is pruned: floor(share n), but never all.

    Of equals the later ones stay. ValueError: share is not in [0, 1], there is nothing, or something not a number.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share {share} is not in [0, 1]")
    if importance.ndim != 1 or not len(importance) or bool(importance.isnan().any()):
        raise ValueError("the importance is not a list of numbers")
    # a hair more, so that 0.29 of 100 are 29
    pruned = min(int(share * len(importance) + 1e-9), len(importance) - 1)
    return tuple(sorted(torch.sort(importance, stable=True).indices[pruned:].tolist()))


def _products(model: PreTrainedModel, layers: str, batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """For each layer |w dL/dw| of its parameters by name, float32; L is the sum of the batches' mean losses."""
    named = [dict(layer.named_parameters()) for layer in _layers(model, layers)]
    parameters = [parameter for layer in named for parameter in layer.values()]
    required = [parameter.requires_grad for parameter in parameters]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    _positive(len(batches))
    targets = _targets(model, batches)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with _at_rest(model), torch.enable_grad():
            for batch in zip(batches, targets, strict=True):
                total, count = _loss(model, *batch)
                # not backward(), which would add to whatever gradients there are
                gradients = torch.autograd.grad(total / _positive(count), parameters, allow_unused=True)
                for sum_, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        sum_ += gradient
    finally:
        for parameter, was in zip(parameters, required, strict=True):
            parameter.requires_grad_(was)
    with torch.no_grad():
        for sum_, parameter in zip(sums, parameters, strict=True):
            sum_.mul_(parameter).abs_()
    each = iter(sums)
    return [{name: next(each) for name in layer} for layer in named]


def _targets(model: PreTrainedModel, batches: Sequence[Tensor]) -> list[Tensor]:
    """What the model's loss is of: all tokens but a row's first; of a classifier the likeliest class of each row."""
    if model.get_output_embeddings() is not None:
        return [ids[:, 1:].to(model.device) for ids in batches]
    if not is_classifier(model):
        raise ValueError(f"{type(model).__name__} predicts no tokens, so it has no loss of a next one")
    with _at_rest(model), torch.no_grad():
        return [model(input_ids=ids.to(model.device)).logits.argmax(1) for ids in batches]


def _loss(model: PreTrainedModel, ids: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """The summed cross-entropy of the targets, float32 scalar, and how many they are."""
    logits = model(input_ids=ids.to(model.device)).logits.float()
    if targets.ndim > 1:
        logits = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum"), targets.numel()


def _layers(model: PreTrainedModel, path: str) -> list[nn.Module]:
    found = model.get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    return list(found)


def _entering(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a layer was called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _positive(count: int) -> int:
    if count < 1:
        raise ValueError("there are no tokens to score by")
    return count


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; then each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
