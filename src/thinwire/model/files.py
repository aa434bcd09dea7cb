"""What a model's files hold, held against the model that was made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thinwire.model.errors import ModelError
from thinwire.model.folder import shards
from thinwire.model.quantised import quantised_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Buffers that older versions of transformers wrote: masks, and what positions turn by.
BUFFERS = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|position_ids)$|rotary_emb\.|rotary_pos_emb\.")


def check_files(model: PreTrainedModel, folder: Path, unused: Iterable[str]) -> None:
    """Raise ModelError for files whose tensors are not what the model computes with, in ways that no error shows.

    `unused` are those that found no place. One within a layer that the model has, or within its stack of layers, means
    that the config is another model's; others, as of a second head or of eyes, may be left aside. Whole numbers are
    weights that somebody has quantised. And no weight may be infinite or NaN.
    """
    for name in sorted(unused):
        if not BUFFERS.search(name) and _within(model, name):
            raise ModelError(
                f"the weights in {folder} hold {name}, which the model of its config.json has no place for"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for shard in shards(folder):
        for name, dtype in _dtypes(folder / shard):
            if dtype[0] in "IUB" and dtype != "BF16" and _spelt(model, name) in parameters:
                raise ModelError(f"{name} in {folder / shard} is of {dtype}: float weights are wanted")
    packed = {id(p) for layer in quantised_layers(model).values() for p in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) in packed or parameter.is_meta or _finite(parameter):
            continue
        held = _held(model, folder, name)
        if held is not None and _finite(held):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(f"model.dtype: {name} in {folder} is beyond what {dtype} holds; bfloat16 and float32 do")
        raise ModelError(f"the weights in {folder} are not all numbers: {name} holds NaN or infinity")


def check_shapes(info: dict[str, Any], what: str) -> None:
    """Raise ModelError for a tensor of another shape than the config makes it; `info` as transformers gives it."""
    for name, held, made in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"cannot load {what}: {name} is {list(held)} in its weights, and its config makes it {list(made)}"
        )


def settle_ties(model: PreTrainedModel) -> None:
    """Have the config record it where head and embeddings are two tensors, as transformers keeps those that differ."""
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    text = model.config.get_text_config()
    if head is not None and getattr(text, "tie_word_embeddings", False) and head.weight is not rows.weight:
        text.tie_word_embeddings = model.config.tie_word_embeddings = False


def unties(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the files hold two different tensors where the (hollow) model has head and embeddings be one."""
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not rows.weight:
        return False
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is rows.weight]
    held = [tensor for name in names if (tensor := _held(model, folder, name)) is not None]
    return any(not torch.equal(held[0], other) for other in held[1:])


def _within(model: PreTrainedModel, name: str) -> bool:
    """Whether the nearest module above the tensor of that name lies below the model and its transformer."""
    modules = {at for at, _ in model.named_modules()}
    within = _spelt(model, name)
    parts = within.split(".")[:-1]
    while parts and ".".join(parts) not in modules:
        parts.pop()
    nearest = ".".join(parts)
    if nearest in ("", model.base_model_prefix):
        return False
    # more layers, for predicting several tokens at once, which are not used
    more = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None)
    rest = within.removeprefix(f"{nearest}.").partition(".")[0]
    return not (more and rest.isdecimal())


def _spelt(model: PreTrainedModel, name: str) -> str:
    """A tensor's name as the model has it: files of a headless model leave the transformer's prefix out."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:  # it has no head itself
        return name.removeprefix(prefix)
    first = name.partition(".")[0]
    inner = {at for at, _ in model.base_model.named_children()}
    return name if name.startswith(prefix) or first not in inner else prefix + name


def _dtypes(file: Path) -> Iterator[tuple[str, str]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no dict
            yield name, opened.get_slice(name).get_dtype()


def _held(model: PreTrainedModel, folder: Path, name: str) -> Tensor | None:
    """The tensor of a parameter as the files hold it."""
    from safetensors import safe_open

    for shard in shards(folder):
        with safe_open(folder / shard, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                if _spelt(model, key) == name:
                    found: Tensor = opened.get_tensor(key)
                    return found
    return None


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() < 2:
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) and torch.isfinite(high))
