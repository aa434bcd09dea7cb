"""What a layer of a model is made of that could be made narrower: heads and MLP channels, and who holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thinwire.model.blocks import layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Family(NamedTuple):
    """The linear modules of a layer: those that give heads and the one that takes them, and the same for channels."""

    heads: tuple[str, ...]
    heads_out: str
    channels: tuple[str, ...]
    channels_out: str


FAMILIES = (
    Family(  # Llama, Mistral, Qwen, Gemma
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
    ),
    Family(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),  # GPT-2, query, key and value in one
    Family(  # BERT, RoBERTa, ELECTRA
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
    ),
)
"""A layer whose linear modules are exactly those of one of these can be narrowed."""

HEAD_NORMS = ("q_norm.weight", "k_norm.weight")
"""Norms inside attention that each head goes through alone, so that fewer heads leave them as they are."""


@dataclass(frozen=True)
class Part:
    """Where a parameter holds groups or channels: along `axis`, `fused` times over, `rows` entries for each."""

    of: Literal["heads", "channels"]
    axis: int
    rows: int = 1
    fused: int = 1


@dataclass(frozen=True)
class Layer:
    """A layer's class, its kv groups and MLP channels, and the parameters (by their names in it) that hold them.

    Of a layer that cannot be narrowed there are no parts. `attention` is the module that counts heads.
    """

    kind: str
    heads: int = 0
    channels: int = 0
    parts: Mapping[str, Part] = field(default_factory=dict)
    attention: str = ""

    def entries(self, part: Part, width: Width | None = None) -> Tensor:
        """Which entries of a parameter that holds this part stay, along its axis, with that width: int64 [n]."""
        every = torch.arange(part.fused * part.rows * (self.heads if part.of == "heads" else self.channels))
        if width is None:
            return every
        kept = width.heads if part.of == "heads" else width.channels
        return every.view(part.fused, -1, part.rows)[:, list(kept)].flatten()


@dataclass(frozen=True)
class Layout:
    """The layers of a big model: the dotted path of their list, and what each is made of."""

    path: str
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, path: str) -> Layout:
        """The layout of a model, be it real or hollow, whose layers are the list at `path`."""
        return cls(path, tuple(_anatomy(layer) for layer in stack_of(model, path)))

    def place(self, name: str) -> tuple[int, str] | None:
        """The layer of the parameter of that name, and its name in the layer; None if it is in none."""
        layer = layer_of(name, self.path)
        return None if layer is None else (layer, name.removeprefix(f"{self.path}.{layer}."))


@dataclass(frozen=True)
class Width:
    """The kv groups and the MLP channels that a layer keeps, ascending, at least one of each (ValueError)."""

    heads: tuple[int, ...]
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        check_ascending("heads", self.heads)
        check_ascending("channels", self.channels)


def stack_of(model: PreTrainedModel, path: str) -> nn.ModuleList:
    found = dict(model.named_modules()).get(path)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of layers at {path!r}")
    return found


def check_ascending(name: str, numbers: tuple[int, ...]) -> None:
    if not numbers or numbers[0] < 0 or any(a >= b for a, b in pairwise(numbers)):
        raise ValueError(f"the {name} kept are none, or not in ascending order from 0")


def _anatomy(layer: nn.Module) -> Layer:
    """What can be narrowed of a layer: nothing, unless its modules and shapes are all as in one of FAMILIES."""
    unknown = Layer(type(layer).__name__)
    linears: dict[str, Any] = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    family = next((f for f in FAMILIES if {*f.heads, f.heads_out, *f.channels, f.channels_out} == set(linears)), None)
    if family is None:
        return unknown
    fused = 3 if len(family.heads) == 1 else 1
    attention = family.heads[0].rpartition(".")[0]
    module = layer.get_submodule(attention)
    size = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    # GPT-BigCode has the names of GPT-2 but not its Conv1D, and keeps query, key and value together head by head
    if not isinstance(size, int) or (fused == 3 and not isinstance(linears[family.heads[0]], Conv1D)):
        return unknown
    within = tuple(f"{name.rpartition('.')[0]}." for name in (*family.heads, *family.channels))
    for name, parameter in layer.named_parameters():
        own = name.rpartition(".")[0] not in linears and name.startswith(within)
        # a norm over all heads or channels at once would see fewer of them and give something else
        if own and not (name.endswith(HEAD_NORMS) and tuple(parameter.shape) == (size,)):
            return unknown
    outputs = {name: module.weight.shape[isinstance(module, Conv1D)] for name, module in linears.items()}
    heads, channels = outputs[family.heads[-1]] // (fused * size), outputs[family.channels[0]]
    query = outputs[family.heads[0]] // fused // max(heads, 1)  # the rows of query that share a key head
    parts: dict[str, Part] = {}
    for name, rows in zip(family.heads, (query, size, size), strict=False):
        parts |= _parts(name, linears[name], Part("heads", 0, rows, fused))
    for name in family.channels:
        parts |= _parts(name, linears[name], Part("channels", 0))
    parts |= _parts(family.heads_out, linears[family.heads_out], Part("heads", 1, query))
    parts |= _parts(family.channels_out, linears[family.channels_out], Part("channels", 1))
    found = Layer(unknown.kind, heads, channels, parts, attention)
    fits = all(layer.get_parameter(name).shape[p.axis] == len(found.entries(p)) for name, p in parts.items())
    return found if heads and query % size == 0 and fits else unknown


def _parts(name: str, linear: nn.Module, part: Part) -> dict[str, Part]:
    """The part as the weight and bias of a linear module hold it, given for a weight [outputs, inputs]."""
    weight = replace(part, axis=1 - part.axis) if isinstance(linear, Conv1D) else part
    # a bias belongs to the outputs
    return {f"{name}.weight": weight} | ({f"{name}.bias": part} if part.axis == 0 and linear.bias is not None else {})
