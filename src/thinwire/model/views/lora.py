"""A LoRA view of a model (Hu et al., 2022, arXiv:2106.09685): small factors beside chosen layers, all else frozen.

W x becomes W x + (alpha / rank) B A x with A [rank, in] and B [out, rank]. Whatever trains a net's parameters then
trains A and B, and sends no more than these.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thinwire.keys import Key
from thinwire.model import head
from thinwire.model.errors import ModelError, first_line
from thinwire.model.meta import hollow
from thinwire.model.quantised import quantised_layers
from thinwire.model.trial import reads_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name of an only adapter
# Where kernels are installed, theirs take the weights of `out_proj`, and nothing in a pass on a CPU shows it.
KERNELS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}


def add_lora(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], key: Key) -> None:
    """Put factors beside every linear layer whose name is, or ends with a dot and, one of `targets`; in place.

    A classifier's head stays trainable as it is.

    B is 0, A uniform on +-1 / sqrt(in) as peft has it, but drawn from `key`: a view is the same everywhere, and the
    global generators stay as they are. Factors have the model's dtype. ModelError: a target that is no layer's name,
    a rank above the smaller side of a layer, a layer whose weights are read and that is not called.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = chosen_layers(model, rank, targets)
    check_called(model, chosen)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(chosen), bias="none")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layers of GPT-2 hold their weights transposed, which peft then minds
        try:
            inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:  # what peft knows of a kind of model
            raise ModelError(f"model.lora.targets: {first_line(error)}") from error
    for name, layer in _lora_layers(model):
        left, right = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        uniform = torch.from_numpy(2 * key.fold(name).uniform(left.numel()) - 1).view_as(left)
        weight = layer.get_base_layer().weight
        dtype = weight.dtype if weight.is_floating_point() else model.dtype  # a quantised one
        left.data = (uniform / math.sqrt(left.shape[1])).to(left.device, dtype)
        right.data = torch.zeros_like(right, dtype=dtype)
    for parameter in head_of(model).values():
        parameter.requires_grad_(True)
    model.eval()  # what has been added came in training mode


def chosen_layers(model: PreTrainedModel, rank: int, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that get factors, by name; ModelError as add_lora. The model may be without memory for its weights."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for target in targets:
        if not any(_meant(name, target) for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ModelError(f"model.lora.targets: no linear layer is called {target}; there are: {', '.join(known)}")
    chosen = {name: layer for name, layer in layers.items() if any(_meant(name, target) for target in targets)}
    for name, layer in chosen.items():
        sides = layer.weight.shape if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
        if rank > min(sides):
            shape = " x ".join(map(str, sides))
            raise ModelError(f"model.lora.rank: {rank} is more than {name} has, which is {shape}")
        if model.config.model_type in KERNELS and name.endswith(".out_proj"):
            raise _not_called(model, name)
    return chosen


def check_called(model: PreTrainedModel, chosen: Iterable[str]) -> None:
    """Raise ModelError for a chosen layer whose weights the model's forward pass reads without calling the layer."""
    around = {name.rpartition(".")[0] for name in reads_of(model)[0]}
    for name in chosen:
        if name in around:
            raise _not_called(model, name)


def _not_called(model: PreTrainedModel, name: str) -> ModelError:
    return ModelError(
        f"model.lora.targets: {type(model).__name__} reads the weights of {name} and does not call the layer, so that "
        "factors beside it would do nothing; choose other layers"
    )


def has_lora(model: nn.Module) -> bool:
    """Whether the model is a LoRA view."""
    return next(_lora_layers(model), None) is not None


def merged(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of the plain model that computes what the view does: W + (alpha / rank) B A under W's own name.

    Of a quantised model, with the weights that it computes with, in its dtype.
    """
    from peft.utils.integrations import dequantize_module_weight

    added = {f"{name}.base_layer.weight": layer for name, layer in _lora_layers(model)}
    quantised = quantised_layers(model)
    packed = {f"{name}.weight": layer for name, layer in quantised.items()}
    within = tuple(f"{name}." for name in quantised)
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if name.startswith(within) and not name.endswith((".weight", ".bias")):
            continue  # scales of a quantised weight
        if name in packed:
            tensor = dequantize_module_weight(packed[name]).to(model.dtype)
        if name in added:
            delta = added[name].get_delta_weight(ADAPTER)
            tensor = (tensor.float() + delta.float()).to(tensor.dtype)
        if name in packed and getattr(packed[name], "source_cls", None) is Conv1D:
            tensor = tensor.t().contiguous()  # which quantising has turned over
        state[name.replace(".base_layer.", ".")] = tensor
    return state


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """What writes the merged state of the view: the model, or without memory one like it that is not quantised."""
    if not quantised_layers(model):
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    empty = hollow(partial(type(model)._from_config, dtype=model.dtype), config)
    if model.can_generate():
        empty.generation_config = model.generation_config
    return empty


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """The factors alone, as a folder that peft's PeftModel.from_pretrained puts on the start model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config[ADAPTER]  # type: ignore[index]
    config.inference_mode = True
    factors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    kept = head_of(model)
    if kept:
        config.modules_to_save = sorted({name.partition(".")[0] for name in kept})
        factors = factors | {name: parameter.detach() for name, parameter in kept.items()}
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": t.contiguous() for name, t in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config.save_pretrained(str(folder))


def head_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """A classifier's head, which is trained whole beside the factors; nothing of a causal model."""
    if not head.is_classifier(model):
        return {}
    return {name: p for name, p in model.named_parameters() if head.of_head(model, name)}


def _meant(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
