"""A smaller model around some layers of a big one: other layers dropped, or with fewer heads and MLP channels.

The hidden size is kept, so a layer that is neither dropped nor narrowed is the big model's own, and what training
changes in it can be copied back as it is. Dropping follows ShortGPT (arXiv:2403.03853) and Shortened LLaMA
(arXiv:2402.02834), narrowing the coupled groups of LLM-Pruner (arXiv:2305.11627): a group is one key/value head with
all query heads that share it, a channel a row of gate and up with a column of down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thinwire.model.blocks import layer_of
from thinwire.model.meta import hollow

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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

IN_HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "all_head_size", "split_size")
"""Attributes of attention modules that are as many times smaller as there are fewer heads."""

NOT_BY_LAYER = re.compile(r"architectures|.*token_ids?|_.*")
"""Lists in a config that have nothing to do with layers, whatever their length."""


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
        return cls(path, tuple(_anatomy(layer) for layer in _stack(model, path)))

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
        _check_ascending("heads", self.heads)
        _check_ascending("channels", self.channels)


@dataclass(frozen=True)
class Cut:
    """What a smaller model keeps: these layers, ascending, at least one, and of some of them less than all of it.

    ValueError if the layers are not so, or a width is of a layer that is not kept.
    """

    layers: tuple[int, ...]
    widths: Mapping[int, Width] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_ascending("layers", self.layers)
        for layer in self.widths:
            if layer not in self.layers:
                raise ValueError(f"layer {layer} has a width and is not kept")

    def check(self, layout: Layout) -> None:
        """ValueError if the model has not those layers, groups or channels, or a layer cannot be narrowed."""
        if self.layers[-1] >= len(layout.layers):
            raise ValueError(f"layer {self.layers[-1]} is kept of {len(layout.layers)} layers")
        for index, width in self.widths.items():
            layer = layout.layers[index]
            if not layer.parts:
                raise ValueError(f"a {layer.kind} cannot be narrowed, only dropped or kept whole")
            for of, kept, count in (
                ("head group", width.heads, layer.heads),
                ("channel", width.channels, layer.channels),
            ):
                if kept[-1] >= count:
                    raise ValueError(f"{of} {kept[-1]} of layer {index} is kept, and it has {count}")

    def packed(self) -> dict[str, Tensor]:
        """The cut as int32 tensors: `layers`, and for each layer i with a width `heads.i` and `channels.i`."""
        found = {"layers": self.layers}
        for index, width in self.widths.items():
            found |= {f"heads.{index}": width.heads, f"channels.{index}": width.channels}
        return {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in found.items()}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], layout: Layout) -> Cut:
        """The cut of a model of that layout; ValueError for tensors that `packed` would not have made of one."""
        found: dict[str, tuple[int, ...]] = {}
        for name, tensor in tensors.items():
            if not re.fullmatch(r"layers|(heads|channels)\.(0|[1-9][0-9]{0,8})", name):
                raise ValueError(f"{name!r} is no part of a cut")
            if tensor.dtype != torch.int32 or tensor.ndim != 1:
                raise ValueError(f"{name} of a cut is {tensor.dtype} of {tensor.ndim} dimensions, not int32 of one")
            found[name] = tuple(tensor.tolist())
        narrowed = {name.partition(".")[2] for name in found if name != "layers"}
        for name in ("layers", *(f"{of}.{index}" for index in narrowed for of in ("heads", "channels"))):
            if name not in found:
                raise ValueError(f"a cut lacks {name}")
        order = sorted(map(int, narrowed))
        cut = cls(found["layers"], {i: Width(found[f"heads.{i}"], found[f"channels.{i}"]) for i in order})
        cut.check(layout)
        return cut


def renamed(name: str, cut: Cut, layout: Layout) -> str | None:
    """What the smaller model calls the big one's parameter: layer numbers move up; None if its layer is dropped."""
    place = layout.place(name)
    if place is None:
        return name
    return f"{layout.path}.{cut.layers.index(place[0])}.{place[1]}" if place[0] in cut.layers else None


def sliced(name: str, tensor: Tensor, cut: Cut, layout: Layout) -> Tensor | None:
    """The tensor of that name in the big model as the smaller one has it; None if its layer is dropped.

    It is `tensor` itself where nothing is cut off, else a copy, of the same dtype and device. ValueError: see shape_of.
    """
    if shape_of(name, tensor.shape, cut, layout) is None:
        return None
    kept = _kept(name, cut, layout)
    return tensor if kept is None else tensor.index_select(kept[0].axis, kept[2].to(tensor.device))


def shape_of(name: str, shape: Sequence[int], cut: Cut, layout: Layout) -> tuple[int, ...] | None:
    """The shape in the smaller model of the big one's parameter; None if its layer is dropped.

    ValueError if `shape` does not hold the groups or channels of the layout.
    """
    if renamed(name, cut, layout) is None:
        return None
    kept = _kept(name, cut, layout)
    if kept is None:
        return tuple(shape)
    part, length, stay = kept
    if len(shape) <= part.axis or shape[part.axis] != length:
        raise ValueError(f"{name} has the shape {tuple(shape)}, and not {length} entries along axis {part.axis}")
    return (*shape[: part.axis], len(stay), *shape[part.axis + 1 :])


def proxy(
    kind: type[PreTrainedModel], config: PreTrainedConfig, cut: Cut, tensors: Mapping[str, Tensor], path: str
) -> PreTrainedModel:
    """The smaller model that is left by the cut of the model of that class and config, its layers the list at `path`.

    tensors: each parameter as `sliced` and `renamed` give it, a tied one once under any of its names, of any floating
    dtype; they become the parameters without a copy. Like all our models it is in eval mode and builds no key-value
    cache. Its attribute `config` has fewer layers and does not tell widths, so that such a model cannot be loaded from
    a folder. ValueError: the cut is not of this model, a tensor is missing, unknown or of another shape.
    """
    model: Any = hollow(kind, config)
    layout = Layout.of(model, path)
    cut.check(layout)
    for index, width in cut.widths.items():
        _narrow(_stack(model, path)[index], layout.layers[index], width)
    _shorten(model, cut, path)
    _fill(model, tensors)
    model.to(next(model.parameters()).device)  # the buffers go where the tensors are
    return cast("PreTrainedModel", model)


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


def _kept(name: str, cut: Cut, layout: Layout) -> tuple[Part, int, Tensor] | None:
    """Where a parameter of a narrowed layer loses entries, how many it had, and which stay; None: it stays whole."""
    index, rest = layout.place(name) or (-1, "")
    if index not in cut.widths or rest not in layout.layers[index].parts:
        return None
    layer = layout.layers[index]
    part = layer.parts[rest]
    return part, len(layer.entries(part)), layer.entries(part, cut.widths[index])


def _narrow(layer: nn.Module, anatomy: Layer, width: Width) -> None:
    """Give a hollow layer the shapes that the width leaves."""
    for name, part in anatomy.parts.items():
        owner, _, leaf = name.rpartition(".")
        linear: Any = layer.get_submodule(owner)
        stay = anatomy.entries(part, width).to("meta")
        setattr(linear, leaf, nn.Parameter(getattr(linear, leaf).detach().index_select(part.axis, stay)))
        if isinstance(linear, Conv1D):
            linear.nx, linear.nf = linear.weight.shape
        else:
            linear.out_features, linear.in_features = linear.weight.shape
    attention = layer.get_submodule(anatomy.attention)
    for attribute in IN_HEADS:
        if isinstance(getattr(attention, attribute, None), int):
            setattr(attention, attribute, getattr(attention, attribute) * len(width.heads) // anatomy.heads)


def _shorten(model: PreTrainedModel, cut: Cut, path: str) -> None:
    """Leave only the cut's layers in the model, and count and list only them in its config.

    They are taken out of the whole stack, not built anew by a shorter config: what a layer has from its old number,
    such as its kind of attention or a scale, so stays.
    """
    stack, config = _stack(model, path), model.config.get_text_config()
    depth = len(stack)
    if config.num_hidden_layers != depth:
        raise ValueError(f"{path} has {depth} layers, and the config counts {config.num_hidden_layers}")
    for index, old in enumerate(cut.layers):
        module: Any
        for module in stack[old].modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = index
    for old in sorted(set(range(depth)) - set(cut.layers), reverse=True):
        del stack[old]
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth and not NOT_BY_LAYER.fullmatch(name):
            setattr(config, name, type(value)(value[old] for old in cut.layers))
    config.num_hidden_layers = len(cut.layers)


def _fill(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors in place of the hollow parameters."""
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    unknown = set(tensors) - {name for names in tied.values() for name in names}
    if unknown:
        raise ValueError(f"the smaller model has no parameter {min(unknown)}")
    for names in tied.values():
        given = [name for name in names if name in tensors]
        if len(given) != 1:
            raise ValueError(f"{names[0]} of the smaller model is given {len(given)} times, not once")
        tensor, shape = tensors[given[0]], tuple(model.get_parameter(names[0]).shape)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.is_meta:
            raise ValueError(f"{given[0]} is {tensor.dtype} of the shape {tuple(tensor.shape)}, not floats of {shape}")
        filled = nn.Parameter(tensor.detach())
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, filled)
    hollow = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if hollow:
        raise ValueError(f"the buffer {hollow[0]} of a {type(model).__name__} cannot be made without its weights")


def _stack(model: PreTrainedModel, path: str) -> nn.ModuleList:
    found = dict(model.named_modules()).get(path)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of layers at {path!r}")
    return found


def _check_ascending(name: str, numbers: tuple[int, ...]) -> None:
    if not numbers or numbers[0] < 0 or any(a >= b for a, b in pairwise(numbers)):
        raise ValueError(f"the {name} kept are none, or not in ascending order from 0")
