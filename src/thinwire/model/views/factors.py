"""Factors beside the linear layers of a model, for views: as peft has LoRA's, names and arithmetic, without it.

`import peft` imports bitsandbytes wherever that is installed, quantised or not, with what it has to complain of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thinwire.keys import Key
from thinwire.model import classifier
from thinwire.model.embedder import POOLER, is_embedder
from thinwire.model.errors import ModelError
from thinwire.model.quantised import floats, quantised_layers
from thinwire.model.trial import reads_of
from thinwire.model.views import sparing
from thinwire.model.views.view import Adapted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name of an only adapter
LORA, VIEW = "model.lora", "model.view"  # the run file's tables of settings, for messages
# Where kernels are installed, theirs take the weights of `out_proj`, and nothing in a pass on a CPU shows it.
KERNELS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}


class Factored(nn.Module):
    """A linear layer with factors beside it: layer(x) + scale B A x, or with a core between them scale B C A x."""

    def __init__(
        self, layer: nn.Linear | Conv1D, left: Tensor, right: Tensor, scale: float, core: Tensor | None = None
    ) -> None:
        """left: A [rank, in], right: B [out, rank], core: C [rank, rank]."""
        super().__init__()
        self.base_layer, self.scale = layer, scale
        self.lora_A, self.lora_B = (nn.ModuleDict({ADAPTER: _linear(factor)}) for factor in (left, right))
        self.lora_C = None if core is None else nn.ModuleDict({ADAPTER: _linear(core)})
        self.in_features, self.out_features = left.shape[1], right.shape[0]

    @property
    def weight(self) -> Tensor:
        """The layer's own: a model may ask for its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.base_layer.bias

    @property
    def factors(self) -> list[Any]:
        """The modules that hold A, B and, with a core, C."""
        return [held[ADAPTER] for held in (self.lora_A, self.lora_B, self.lora_C) if held is not None]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        found: Tensor = self.base_layer(x)
        left, right, *core = self.factors
        inner = sparing.linear(left, x.to(left.weight.dtype))
        for square in core:
            inner = square(inner)
        beside: Tensor = right(inner) * self.scale
        return (found + beside).to(found.dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The two matrices whose product it adds, scaled: A and B, or with a core A and B C; in float32 on a CPU."""
        left, right, *core = (factor.weight.detach() for factor in self.factors)
        if left.device.type == "cpu":
            left, right = left.float(), right.float()
        for square in core:
            right = right @ square.to(right.dtype)
        return left, right

    def delta(self) -> Tensor:
        """scale B A, or B C A, in the shape of the layer's weight and the factors' dtype."""
        left, right = self.pair()
        dtype, product = self.factors[0].weight.dtype, right @ left
        return ((product.T if isinstance(self.base_layer, Conv1D) else product) * self.scale).to(dtype)


def add(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], key: Key) -> None:
    """Put factors beside every linear layer whose name is, or ends with a dot and, one of `targets`; in place.

    All else is frozen, but for a classifier's head. B is 0, A uniform on +-1 / sqrt(in) as peft has it, but drawn from
    `key`: a view is the same everywhere, and the global generators stay as they are. Factors have the model's dtype.
    ModelError: a target that is no layer's name, a rank above the smaller side of a layer, a layer whose weights are
    read and that is not called.
    """
    _put(model, rank, alpha, targets, lambda name, n, m: drawn(key.fold(name), rank, n, m))


def add_cores(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], key: Key) -> None:
    """As `add`, but A and B stay as they are drawn, and C between them is trained, which is 0.

    Signs drawn from `key`, of A over sqrt(in). ModelError as `add`, of the table model.view.
    """
    _put(model, rank, alpha, targets, lambda name, n, m: drawn(key.fold(name), rank, n, m, True), VIEW)
    for layer in _factored(model).values():
        for side in (layer.lora_A, layer.lora_B):
            side.requires_grad_(False)


def drawn(key: Key, rank: int, taken: int, given: int, core: bool = False) -> list[Tensor]:
    """What a layer's factors begin with, from the key of its name, float32: A, B and, with a core, C."""
    if core:
        left, right = (_signs(key.fold(side), n, m) for side, n, m in (("A", rank, taken), ("B", given, rank)))
        return [left / math.sqrt(taken), right, torch.zeros((rank, rank))]
    uniform = torch.from_numpy(2 * key.uniform(rank * taken) - 1).view(rank, taken)
    return [uniform / math.sqrt(taken), torch.zeros((given, rank))]


def shapes(model: PreTrainedModel, rank: int, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """What `add` would let be trained of a model; the model may be without memory for its weights."""
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in chosen_layers(model, rank, targets).items():
        taken, given = sides(layer)
        found |= {f"{name}.lora_A.{ADAPTER}.weight": (rank, taken), f"{name}.lora_B.{ADAPTER}.weight": (given, rank)}
    return found | _head_shapes(model)


def core_shapes(model: PreTrainedModel, rank: int, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The same of `add_cores`."""
    chosen = chosen_layers(model, rank, targets, VIEW)
    return {f"{name}.lora_C.{ADAPTER}.weight": (rank, rank) for name in chosen} | _head_shapes(model)


def places(model: PreTrainedModel) -> dict[str, Adapted]:
    """The layers with factors, by name."""
    left, right = f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"
    return {
        name: Adapted(f"{name}.base_layer.weight", f"{name}.{left}", f"{name}.{right}", layer.scale)
        for name, layer in _factored(model).items()
    }


def chosen_layers(
    model: PreTrainedModel, rank: int, targets: Sequence[str], table: str = LORA
) -> dict[str, nn.Linear | Conv1D]:
    """The layers that get factors, by name; the model may be without memory for its weights.

    ModelError as `add`, of the run file's `table`.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if is_embedder(model):
        layers = {name: layer for name, layer in layers.items() if not name.startswith(POOLER)}
    for target in targets:
        if not any(_meant(name, target) for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ModelError(f"{table}.targets: no linear layer is called {target}; there are: {', '.join(known)}")
    chosen = {name: layer for name, layer in layers.items() if any(_meant(name, target) for target in targets)}
    for name, layer in chosen.items():
        if rank > min(sides(layer)):
            shape = " x ".join(map(str, layer.weight.shape))
            raise ModelError(f"{table}.rank: {rank} is more than {name} has, which is {shape}")
        if model.config.model_type in KERNELS and name.endswith(".out_proj"):
            raise _not_called(model, name, table)
    return chosen


def check_called(model: PreTrainedModel, chosen: Iterable[str], table: str = LORA) -> None:
    """Raise ModelError for a chosen layer whose weights the model's forward pass reads without calling the layer."""
    around = {name.rpartition(".")[0] for name in reads_of(model)[0]}
    for name in chosen:
        if name in around:
            raise _not_called(model, name, table)


def _not_called(model: PreTrainedModel, name: str, table: str) -> ModelError:
    return ModelError(
        f"{table}.targets: {type(model).__name__} reads the weights of {name} and does not call the layer, so that "
        "factors beside it would do nothing; choose other layers"
    )


def merged(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of the plain model that computes what the view does: W + (alpha / rank) B A under W's own name.

    Of a quantised model, with the weights that it computes with, in its dtype.
    """
    added = {f"{name}.base_layer.weight": layer for name, layer in _factored(model).items()}
    quantised = quantised_layers(model)
    packed = {f"{name}.weight": layer for name, layer in quantised.items()}
    within = tuple(f"{name}." for name in quantised)
    state = {}
    for name, tensor in model.state_dict().items():
        if any(f".lora_{side}." in name for side in "ABC"):
            continue
        if name.startswith(within) and not name.endswith((".weight", ".bias")):
            continue  # scales of a quantised weight
        if name in packed:
            tensor = floats(packed[name]).to(model.dtype)
        if name in added:
            tensor = (tensor.float() + added[name].delta().float()).to(tensor.dtype)
        if name in packed and getattr(packed[name], "source_cls", None) is Conv1D:
            tensor = tensor.t().contiguous()  # which quantising has turned over
        state[name.replace(".base_layer.", ".")] = tensor
    return state


def save(model: PreTrainedModel, settings: Mapping[str, Any], folder: Path) -> None:
    """The factors alone, as a folder that peft's PeftModel.from_pretrained puts on the start model.

    `settings` is what its adapter_config.json says of rank, scale and the like beside the layers' names.
    """
    from safetensors.torch import save_file

    layers, kept = _factored(model), head_of(model)
    found = {name: parameter.detach() for name, parameter in kept.items()}
    for name, layer in layers.items():
        left, right = (factor.to(layer.factors[0].weight.dtype) for factor in layer.pair())
        found |= {f"{name}.lora_A.weight": left, f"{name}.lora_B.weight": right}
    config = {
        **settings,
        "peft_type": "LORA",
        "target_modules": list(layers),
        "modules_to_save": sorted({name.partition(".")[0] for name in kept}) or None,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in found.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def head_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """A classifier's head, which is trained whole beside the factors; nothing of a causal model."""
    if not classifier.is_classifier(model):
        return {}
    return {name: p for name, p in model.named_parameters() if classifier.of_head(model, name)}


def _head_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in head_of(model).items()}


def _put(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    drawn: Callable[[str, int, int], Iterable[Tensor]],
    table: str = LORA,
) -> None:
    """Freeze all but a classifier's head, and put beside each layer what is drawn for its name and its sides."""
    chosen = chosen_layers(model, rank, targets, table)
    if not any(layer.weight.is_meta for layer in chosen.values()):  # a pass shows it, where there are weights
        check_called(model, chosen, table)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in chosen.items():
        weight = layer.weight
        dtype = weight.dtype if weight.is_floating_point() else model.dtype  # a quantised one
        device = "cpu" if weight.is_meta else weight.device  # they are there where a model's weights are not
        left, right, *core = (factor.to(device, dtype) for factor in drawn(name, *sides(layer)))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Factored(layer, left, right, alpha / rank, *core).eval())
    for parameter in head_of(model).values():
        parameter.requires_grad_(True)


def _signs(key: Key, rows: int, columns: int) -> Tensor:
    """+1 and -1 in float32, a bit each."""
    words = key.words(-(-rows * columns // 64))
    bits = np.unpackbits(words.view(np.uint8), count=rows * columns, bitorder="little")
    return torch.from_numpy(np.where(bits, np.float32(1), np.float32(-1))).view(rows, columns)


def _meant(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _factored(model: nn.Module) -> dict[str, Factored]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Factored)}


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def sides(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """How many numbers a layer takes and gives."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
