"""The sketch of a run's model from its config alone, and what a pass over a batch takes."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from thinwire.config import Run
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.classifier import Task, has_head, task_in, task_of
from thinwire.model.embedder import settle
from thinwire.model.errors import ModelError, first_line
from thinwire.model.folder import check_adapter
from thinwire.model.load import DTYPES
from thinwire.model.meta import hollow
from thinwire.model.quantised import HEADS
from thinwire.model.resolve import PACKAGED, resolve
from thinwire.model.views.factors import check_called, chosen_layers, head_of
from thinwire.model.views.factors import shapes as beside_layers
from thinwire.perturb.probe import check_read
from thinwire.train.objective import cross_entropies

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Factors = tuple[int, Sequence[str]]  # their rank, and beside which layers


def sketch(run: Run, classes: Callable[[], int] = lambda: 2) -> Sketch:
    """The run's model from its config alone; raises ModelError. `classes`: how many a fresh head distinguishes."""
    config, dtype = config_of(run.model.path), DTYPES[run.model.dtype]
    known = config.to_dict()
    task = task_in(known, run.model.path, run.task)
    if task == "classification" and not has_head(known):
        config.num_labels = classes()
    try:
        model = hollow(partial(_form(task).from_config, dtype=dtype, trust_remote_code=False), config)
    except Exception as error:  # a config may be wrong in as many ways as there are architectures
        raise ModelError(f"cannot make a model of the config of {run.model.path}: {first_line(error)}") from error
    if task == "embedding":
        settle(model)
    whole = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if run.model.bits is not None:
        each = {8: 1.0, 4: 0.5 + 4 / 64}[run.model.bits]  # four bits: a float32 scale for 64 weights
        layers = (m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n not in HEADS)
        whole -= int(sum(layer.weight.numel() for layer in layers) * (dtype.itemsize - each))
    shapes = run.model.view.trained(model)
    view = run.model.view
    kept = torch.float32 if view.float32 else dtype
    trained = {name: torch.empty(shape, dtype=kept, device="meta") for name, shape in shapes.items()}
    own = {name for name, _ in model.named_parameters()}
    beside = {} if view.factors is None else beside_layers(model, *view.factors)  # follow what is trained, or stay
    whole += sum(math.prod(shape) for name, shape in (beside | shapes).items() if name not in own) * dtype.itemsize
    written = trained.values() if view.factors is not None else model.parameters()  # one by one, as they are trained
    largest = max(tensor.numel() for tensor in written) * dtype.itemsize
    return Sketch(trained, whole, largest, config, dtype, task, adapted=view.factors is not None)


def _form(task: Task) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if task == "embedding":
        return AutoModel
    return AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification


def config_of(path: str) -> PreTrainedConfig:
    """The config of a model: a folder that may hold nothing else, a packaged one, or a name on the hub."""
    from transformers import AutoConfig

    here = Path(path).expanduser()
    local = here.is_dir()
    folder: Any = here if local else path
    if local:
        check_adapter(here)
    if not local and (here.suffix == ".gguf" or path.lower() in PACKAGED):
        folder, local = resolve(path), True
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # json, validation, the hub client: each has its own
        if local and (here / "config.json").is_file():
            task_of(here)  # which may have better words for it
        raise ModelError(f"model.path: no config at {path}: {first_line(error)}") from None
    return config


def one_pass(
    model: Sketch, rows: int, length: int, answer: int, factors: Factors | None = None, probed: str | None = None
) -> Pass:
    """What a forward pass over `rows` rows of `length` tokens takes, logits at `answer` positions of each (a
    classifier has one set of them).

    Run on tensors without memory, on models of one and of two layers: each further layer takes what the second took.
    With `factors` the weights are frozen, and such are trained beside them; `probed` names a method that perturbs
    weights. ModelError: the model is none for these, or cannot be run so.
    """
    layers = int(model.config.get_text_config().num_hidden_layers)
    try:
        few = [_measured(model, n, rows, length, answer, factors, probed) for n in (1, 2)]
    except ModelError:
        raise
    except Exception as error:  # an architecture may need what tensors without memory have not
        raise ModelError(f"a pass of this {model.config.model_type} cannot be measured: {first_line(error)}") from error
    kept, flops = (few[0][i] + (layers - 1) * (few[1][i] - few[0][i]) for i in (0, 2))
    return Pass(int(kept), int(max(few[0][1], few[1][1])), float(flops))


def _measured(
    model: Sketch, layers: int, rows: int, length: int, answer: int, factors: Factors | None, probed: str | None
) -> tuple[float, float, float]:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) and not isinstance(getattr(type(text), "layer_types", None), property):
        text.layer_types = text.layer_types[:layers]
    config.use_cache = False
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = _form(model.task).from_config(config, dtype=model.dtype, trust_remote_code=False).eval()
        own = list[Tensor]()  # factors, which are weights too
        if factors is not None:
            rank, targets = factors
            for parameter in net.parameters():
                parameter.requires_grad_(False)
            chosen = chosen_layers(net, rank, targets)
            check_called(net, chosen)
            # of a factor that stays as it is no gradient needs what goes in
            learns = not any(".lora_" in n for n in model.trained) or any(".lora_A." in n for n in model.trained)
            own += [factor for layer in chosen.values() for factor in _beside(layer, rank, learns)]
            for parameter in head_of(net).values():
                parameter.requires_grad_(True)
        elif probed is not None:
            check_read(net, [name for name, _ in net.named_parameters()], probed)
        found = []
        for training in (True, False):
            live = Live([*net.parameters(), *own])
            with torch.set_grad_enabled(training), live, FlopCounterMode(display=False) as counter:
                loss = _loss(net, model.task, rows, length, answer)
                found.append(live.now if training else live.peak)
                del loss
    return found[0], found[1], counter.get_total_flops()


def _loss(net: PreTrainedModel, task: Task, rows: int, length: int, answer: int) -> Tensor:
    """The loss as train.objective computes it, on tokens that are not there."""
    ids = torch.zeros((rows, length), dtype=torch.int64)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if task == "classification":
        return F.cross_entropy(net(input_ids=ids, **options).logits.float(), torch.zeros(rows, dtype=torch.int64))
    if task == "embedding":  # pairs or more, of which each row is held against all others here
        found = F.normalize(net(input_ids=ids, **options).last_hidden_state.float().mean(1), dim=-1)
        return F.cross_entropy(found @ found.T, torch.arange(rows))
    options["position_ids"] = torch.arange(length).expand(rows, length)
    width = max(1, min(answer, length - 1))
    options["logits_to_keep"] = torch.arange(length - 1 - width, length - 1)
    logits = net(input_ids=ids, use_cache=False, **options).logits[:, -width:]
    return cross_entropies(logits.flatten(0, 1), torch.zeros(rows * width, dtype=torch.int64)).mean()


def _sides(layer: nn.Module) -> tuple[int, int]:
    """How many numbers a layer takes and gives."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _beside(layer: nn.Module, rank: int, learns: bool) -> tuple[Tensor, Tensor]:
    """Have a frozen layer add what factors beside it compute, as peft's do; `learns`: whether the first one does."""
    inner, (taken, given) = layer.forward, _sides(layer)
    dtype = next(layer.parameters()).dtype
    left = torch.empty((rank, taken), dtype=dtype, requires_grad=learns)
    right = torch.empty((given, rank), dtype=dtype, requires_grad=True)
    layer.forward = lambda x: inner(x) + F.linear(F.linear(x, left), right) * 2.0
    return left, right


class Live(TorchDispatchMode):
    """Inside, bytes of the storages that are alive, now and at most; what is given at first does not count."""

    def __init__(self, without: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in without}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._sizes:
            return
        self._sizes[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, place)

    def _drop(self, place: int) -> None:
        self.now -= self._sizes.pop(place)
