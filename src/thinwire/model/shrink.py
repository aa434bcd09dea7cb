"""A smaller model around some layers of a big one: other layers dropped, or with fewer heads and MLP channels.

The hidden size is kept, so a layer that is neither dropped nor narrowed is the big model's own, and what training
changes in it can be copied back as it is. Dropping follows ShortGPT (arXiv:2403.03853) and Shortened LLaMA
(arXiv:2402.02834), narrowing the coupled groups of LLM-Pruner (arXiv:2305.11627): a group is one key/value head with
all query heads that share it, a channel a row of gate and up with a column of down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thinwire.model.anatomy import Layer, Layout, Part, Width, check_ascending, stack_of
from thinwire.model.meta import hollow

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


IN_HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "all_head_size", "split_size")
"""Attributes of attention modules that are as many times smaller as there are fewer heads."""

NOT_BY_LAYER = re.compile(r"architectures|.*token_ids?|_.*")
"""Lists in a config that have nothing to do with layers, whatever their length."""


@dataclass(frozen=True)
class Cut:
    """What a smaller model keeps: these layers, ascending, at least one, and of some of them less than all of it.

    ValueError if the layers are not so, or a width is of a layer that is not kept.
    """

    layers: tuple[int, ...]
    widths: Mapping[int, Width] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ascending("layers", self.layers)
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
    cache. Its attribute `config` has fewer layers and no widths, so that such a model cannot be loaded from
    a folder. ValueError: the cut is not of this model, a tensor is missing, unknown or of another shape.
    """
    model: Any = hollow(kind, config)
    layout = Layout.of(model, path)
    cut.check(layout)
    for index, width in cut.widths.items():
        _narrow(stack_of(model, path)[index], layout.layers[index], width)
    _shorten(model, cut, path)
    _fill(model, tensors)
    model.to(next(model.parameters()).device)  # the buffers go where the tensors are
    return cast("PreTrainedModel", model)


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
    stack, config = stack_of(model, path), model.config.get_text_config()
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
