"""What a model is for, to go on with a text or to name the class of a whole one; and what a classifier has beyond it.

Its head are the parameters after the transformer, fresh ones drawn from a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from thinwire.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from thinwire.keys import Key

Task = Literal["causal", "classification", "embedding"]
Wanted = Literal["auto", "causal", "classification", "embedding"]


def task_of(folder: Path, wanted: Wanted = "auto") -> Task:
    """The task of the model in a folder, found from its config where `wanted` is auto.

    A classifier is one by its config, or an encoder such as BERT, which gets a fresh head. ModelError: the
    model is neither, or not what is wanted.
    """
    return task_in(_config(folder), folder, wanted)


def task_in(config: dict[str, Any], folder: Path | str, wanted: Wanted) -> Task:
    """The same of a config that has been read; `folder` is named in errors."""
    from transformers.models.auto import modeling_auto as known

    kind, classes = config.get("model_type"), config.get("architectures") or []
    classifies = kind in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    continues = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = next(iter(classes), None) or f"model of the type {kind}"
    if kind is None:
        raise ModelError(f"cannot load the model in {folder}: its config.json names no model_type")
    if not (continues or classifies) and config.get("auto_map"):
        raise ModelError(
            f"the {named} in {folder} brings code of its own (auto_map in its config.json), and code of a model is "
            f"never run: transformers itself must know the type {kind}"
        )
    encoder = kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    if wanted == "embedding":
        if not encoder or config.get("is_encoder_decoder"):
            raise ModelError(f'data.loss: "contrastive" trains an encoder, and the {named} in {folder} is none')
        return wanted
    if config.get("is_encoder_decoder") and wanted != "classification":
        raise ModelError(
            f"the {named} in {folder} is neither a causal model nor a classifier of texts: "
            "it is an encoder with a decoder (is_encoder_decoder)"
        )
    if wanted == "causal" and continues and encoder and not config.get("causal"):  # XLM's word for is_decoder
        raise ModelError(
            f"model.task: the {named} in {folder} is an encoder, whose positions see what follows them: not causal"
        )
    if (wanted == "causal" and not continues) or (wanted == "classification" and not classifies):
        raise ModelError(f"model.task: the {named} in {folder} has no form for {wanted}")
    if wanted != "auto":
        return wanted
    if classifies and (encoder or has_head(config)):
        return "classification"
    if not continues:
        raise ModelError(f"the {named} in {folder} is neither a causal model nor a classifier of texts")
    return "causal"


def labels_of(folder: Path) -> tuple[str, ...] | None:
    """The classes that a classifier in a folder already distinguishes, in its order; None where its head is to be made.

    Classes without names, LABEL_0 and so on in a config, are called by their numbers. ModelError: the config's names
    cannot be read.
    """
    config = _config(folder)
    if not has_head(config):
        return None
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(int(config.get("num_labels", 2)))}
    try:
        found = tuple(str(names[str(i)]) for i in range(len(names)))
    except (KeyError, TypeError):
        raise ModelError(f"{folder / 'config.json'}: id2label does not name the classes 0 to n - 1") from None
    plain = all(re.fullmatch(r"LABEL_\d+", name) for name in found)
    return tuple(map(str, range(len(found)))) if plain else found


def has_head(config: dict[str, Any]) -> bool:
    """Whether the config is that of a model with a classifier's head."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or [])


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


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model in {folder}: its config.json cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"cannot load the model in {folder}: its config.json is no object")
    return found
