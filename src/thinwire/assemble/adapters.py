"""Adapters of one base, made one: the weighted mean of what their factors multiply to.

    sum_i share_i scale_i B_i A_i = [share_1 scale_1 B_1, share_2 scale_2 B_2, ...] [A_1; A_2; ...]

Factors side by side have the mean of the products as their product, in the sum of the ranks: nothing is approximated.
The mean of the factors themselves would be another matrix.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thinwire.model.classifier import task_of
from thinwire.model.embedder import describe
from thinwire.model.errors import ModelError, first_line
from thinwire.model.folder import ADAPTER, check_replaceable, whole_folder
from thinwire.model.load import load
from thinwire.model.net import Net
from thinwire.model.numbers import digest
from thinwire.model.resolve import resolve
from thinwire.model.tokens_and_generation import caching, quiet
from thinwire.model.views import factors
from thinwire.model.views.pairs import Pairs, pairs, place

if TYPE_CHECKING:
    from collections.abc import Mapping

PLAIN = {"bias": "none", "use_dora": False, "modules_to_save": None, "lora_bias": False}  # what is read of peft's
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """Factors beside the layers of a base model, which lies in the folder `base`."""

    source: Path
    base: Path
    dtype: str
    layers: Pairs


def of_net(source: Path, net: Net) -> Adapter:
    """What a net's view has beside its layers; ModelError: nothing is, or it is not all that has changed."""
    places = factors.places(net.model)
    if not places:
        raise ModelError(f"{source}: its view, {net.view.kind}, has no factors beside layers to be merged")
    if factors.head_of(net.model):
        raise ModelError(f"{source}: a classifier's head is trained with its factors, and heads are not merged")
    net.view.refresh(net.model)  # factors that follow numbers
    for adapted in places.values():
        weight = net.model.get_parameter(adapted.weight)
        if weight.is_floating_point() and not torch.equal(weight.cpu(), net.base[adapted.weight]):
            raise ModelError(f"{source}: factors of its earlier rounds are in the weights, so those beside are not all")
    dtype = str(net.model.dtype).removeprefix("torch.")
    return Adapter(source, net.folder, dtype, pairs(net.model))


def read(folder: Path, base: str | None) -> Adapter:
    """A folder of peft's with LoRA factors; `base`: where its model is, None: what it calls it. ModelError."""
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        kind = config["peft_type"]
    except Exception as error:  # safetensors, json and the system have their own
        raise ModelError(f"{folder}: cannot read the adapter: {first_line(error)}") from None
    if kind != "LORA":
        raise ModelError(f"{folder}: an adapter of the kind {kind}; only LORA has products to be merged")
    for name, plain in PLAIN.items():
        if config.get(name, plain) not in (plain, None, []):
            raise ModelError(f"{folder}: the adapter has {name} = {config[name]}, which is more than factors")
    where = base or config.get("base_model_name_or_path")
    if not where:
        raise ModelError(f"{folder}: the adapter does not name its base model: give it with --base")
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = NAME.fullmatch(name)
        if found is None or tensor.ndim != 2:
            raise ModelError(f"{folder}: {name} is no factor of a linear layer")
        held.setdefault(found[1], {})[found[2]] = tensor.float()
    layers = {}
    for name, sides in held.items():
        if len(sides) < 2 or len(sides["A"]) != sides["B"].shape[1]:
            raise ModelError(f"{folder}: the two factors of {name} do not go together")
        layers[name] = sides["A"], sides["B"] * _scale(config, name, len(sides["A"]))
    return Adapter(folder, resolve(where), "float32", layers)


def merge(adapters: Sequence[Adapter], weights: Sequence[float], out: Path) -> int:
    """Write the base with the mean of the adapters in it, and in `adapter` the mean alone, for peft; its rank.

    ModelError: they are of different bases, or of layers that the base does not have; see check_replaceable.
    """
    check_replaceable(out)
    first = adapters[0]
    _check_bases(adapters)
    shares = [weight / sum(weights) for weight in weights]
    model, tokenizer, _ = load(first.base, first.dtype, embeds=_embeds(first))
    joined = mean(adapters, shares)
    place(model, joined, str(out))
    rank = len(next(iter(joined.values()))[0])
    with quiet(), caching(model), whole_folder(out, replace=True) as fresh:
        factors.save(model, {"r": rank, "lora_alpha": rank}, fresh / "adapter")
        model.save_pretrained(fresh, state_dict=factors.merged(model))
        tokenizer.save_pretrained(fresh)
        describe(model, first.base, fresh)
    return rank


def mean(adapters: Sequence[Adapter], shares: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of all side by side, of each layer that one of them has; of one rank, filled up with zeros."""
    held: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter, share in zip(adapters, shares, strict=True):
        for name, (left, right) in adapter.layers.items():
            held.setdefault(name, []).append((left, share * right))
    rank = max(sum(len(left) for left, _ in several) for several in held.values())
    found = {}
    for name, several in held.items():
        if len({(left.shape[1], len(right)) for left, right in several}) > 1:
            raise ModelError(f"the factors of {name} in the adapters are for layers of different sizes")
        left, right = torch.cat([left for left, _ in several]), torch.cat([right for _, right in several], dim=1)
        more = rank - len(left)
        padded = torch.nn.functional.pad
        found[name] = padded(left, (0, 0, 0, more)), padded(right, (0, more))
    return found


def _check_bases(adapters: Sequence[Adapter]) -> None:
    """ModelError unless all are of the first one's base: of its folder, or of weights with the same hash."""
    first, known = adapters[0], dict[Path, str]()
    for other in adapters[1:]:
        if other.base.resolve() == first.base.resolve():
            continue
        for folder in (first.base, other.base):
            if folder not in known:
                known[folder] = digest(Net.open(folder, first.dtype, hollow=True, embeds=_embeds(first)))
        mine, its = known[first.base], known[other.base]
        if mine != its:
            raise ModelError(
                f"{other.source}: it is of another base model, {its} ({other.base}), than {first.source}, {mine} "
                f"({first.base}): they cannot be merged"
            )


def _embeds(adapter: Adapter) -> bool:
    """Whether the base is an encoder, of which only embeddings have factors and nothing else that is trained."""
    return task_of(adapter.base) == "classification"


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What peft multiplies a layer's product by."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), None)
    alpha = float(config.get("lora_alpha", 8) if alpha is None else alpha)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
