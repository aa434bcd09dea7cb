"""Where virtual tokens begin, into which models they go, and how they are kept in a model's folder."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from thinwire.keys import Key
from thinwire.model import classifier
from thinwire.model.blocks import layers_of
from thinwire.model.errors import ModelError, first_line
from thinwire.model.start import Base
from thinwire.model.trial import VIRTUAL, positions, tokens_of
from thinwire.model.views.factors import head_of
from thinwire.model.views.view import PROMPT, Source
from thinwire.model.views.virtual import Virtual, of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Start(NamedTuple):
    """Where virtual tokens begin; see Prompt. `source` has the tokenizer, and the folder for what is not in memory."""

    init: str
    text: str
    key: Key
    source: Source | None

    def rows(self, model: PreTrainedModel, tokens: int, layer: int) -> Tensor:
        """[tokens, width] for a layer, on the CPU or where the embedding is."""
        embedding: Any = model.get_input_embeddings()
        key, width = self.key.fold(layer), embedding.weight.shape[1]
        if self.init == "normal":
            deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
            law = NormalDist(0.0, deviation)
            drawn = [law.inv_cdf(u + 2.0**-54) for u in key.uniform(tokens * width).tolist()]
            return torch.tensor(drawn, dtype=torch.float64).view(tokens, width).to(embedding.weight.dtype)
        if self.source is None:
            raise ModelError("model.view.init: words need the model's tokenizer")
        if self.init == "adapter":
            return _saved(self.source.folder, (tokens, width), layer).to(embedding.weight.dtype)
        count = embedding.weight.shape[0]
        ids = torch.tensor(self._words(count, tokens, key) if self.init == "vocabulary" else self._text(count, tokens))
        table = _table(model, self.source.folder)
        # through the module, which may scale what it looks up
        found: Tensor = functional_call(embedding, {"weight": table}, (ids.to(table.device),))
        return found.detach()

    def _words(self, count: int, tokens: int, key: Key) -> list[int]:
        """Tokens of letters alone, if there are as many."""
        assert self.source is not None
        tokenizer = self.source.tokenizer
        special = set(tokenizer.all_special_ids)
        plain = [i for i in key.permutation(min(count, len(tokenizer))).tolist() if i not in special] or [0]
        words = list(itertools.islice((i for i in plain if str(tokenizer.decode([i])).strip().isalpha()), tokens))
        return list(itertools.islice(itertools.cycle([*words, *(i for i in plain if i not in {*words})]), tokens))

    def _text(self, count: int, tokens: int) -> list[int]:
        assert self.source is not None
        found = self.source.tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        if not found or max(found) >= count:
            raise ModelError(
                f"model.view.text: {self.text!r:.60} has no tokens that the model's embedding has rows for"
            )
        return list(itertools.islice(itertools.cycle(found), tokens))


@torch.no_grad()
def attach(model: PreTrainedModel, tokens: int, deep: bool, start: Start) -> None:
    """Put virtual tokens in front of the model's rows, in place; all else is frozen, but for a classifier's head.

    ModelError: the model does not compute from the embeddings of its tokens alone, has no list of layers where the
    prompt is `deep`, or no room for so many.
    """
    widths = _widths(model, tokens, deep)
    if hasattr(model.base_model, VIRTUAL):
        raise ModelError("model.view: the model has a prompt in front already")
    embedding: Any = model.get_input_embeddings()
    hollow = embedding.weight.is_meta
    if not hollow:
        _check_embedded(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows = [start.rows(model, tokens, layer) for layer in range(len(widths))]
    device = "cpu" if hollow else embedding.weight.device
    virtual = Virtual([row.to(device, copy=True).contiguous() for row in rows], tokens_of(model, 1)[0])
    for parameter in head_of(model).values():
        parameter.requires_grad_(True)
    virtual.stand_before(model, layers_of(model) if deep else None)
    if not hollow:
        _pass(model, "a row with a prompt in front", input_ids=torch.tensor([tokens_of(model, 8)], device=device))


def shapes(model: PreTrainedModel, tokens: int, deep: bool) -> dict[str, tuple[int, ...]]:
    """What `attach` would let be trained of a model; the model may be without memory for its weights."""
    place = "" if model.base_model is model else f"{model.base_model_prefix}."
    widths = _widths(model, tokens, deep)
    found = {f"{place}{VIRTUAL}.{layer}.weight": (tokens, width) for layer, width in enumerate(widths)}
    return found | {name: tuple(parameter.shape) for name, parameter in head_of(model).items()}


def save(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Write the virtual tokens, and a head that is trained with them, into the folder; the state of the model below.

    A prompt of one layer is an adapter too that peft's PeftModel.from_pretrained puts on that model.
    """
    from safetensors.torch import save_file

    virtual, kept = of(model), head_of(model)
    assert virtual is not None
    fronts = {name.partition(".")[0]: p.detach().contiguous() for name, p in virtual.named_parameters()}
    folder.mkdir()
    save_file(fronts, folder / PROMPT.name)
    if len(fronts) == 1:
        text = model.config.get_text_config()
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "SEQ_CLS" if classifier.is_classifier(model) else "CAUSAL_LM",
            "num_virtual_tokens": virtual.count,
            "token_dim": fronts["0"].shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": text.num_attention_heads,
            "num_layers": text.num_hidden_layers,
            "prompt_tuning_init": "RANDOM",  # of which nothing is left, once it is loaded
            "modules_to_save": sorted({name.partition(".")[0] for name in kept}) or None,
            "inference_mode": True,
        }
        heads = {f"base_model.model.{name}": p.detach().contiguous() for name, p in kept.items()}
        save_file({"prompt_embeddings": fronts["0"]} | heads, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    inside = re.compile(rf"(^|\.){VIRTUAL}\.")
    return {name: tensor for name, tensor in model.state_dict().items() if not inside.search(name)}


def read(file: Path) -> Mapping[str, Tensor]:
    """The virtual tokens of a folder's prompt, by layer; ModelError for a file that holds none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {file}: {first_line(error)}") from error
    names = [str(layer) for layer in range(len(found))]
    if not found or set(found) != {*names} or any(found[n].ndim != 2 or not found[n].numel() for n in names):
        raise ModelError(f"{file}: it holds no virtual tokens")
    return found


def _widths(model: PreTrainedModel, tokens: int, deep: bool) -> list[int]:
    """How wide the rows of each front are; ModelError as `attach`."""
    name, room = type(model).__name__, positions(model)
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"model.view: {name} takes no embeddings (inputs_embeds), so no prompt can stand among them")
    try:
        width = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[index]
    except (NotImplementedError, AttributeError, IndexError):
        raise ModelError(f"model.view: {name} has no input embeddings for a prompt to stand among") from None
    if room is not None and tokens + 2 > room:
        raise ModelError(f"model.view.tokens: {tokens} leave no room for a row in the {room} positions of {name}")
    if not deep:
        return [width]
    hidden = getattr(model.config.get_text_config(), "hidden_size", width)
    if hidden != width:
        raise ModelError(f"model.view.deep: layers of {name} are {hidden} wide, and its embedding is {width}")
    try:
        stack = model.get_submodule(layers_of(model))
    except ModelError as error:
        raise ModelError(f"model.view.deep: {str(error).partition(':')[0]}") from None
    return [width] * len(stack)  # type: ignore[arg-type]


def _check_embedded(model: PreTrainedModel) -> None:
    """Raise ModelError where the embeddings of a few tokens do not give what the tokens give."""
    ids = torch.tensor([tokens_of(model, 8)], device=model.get_input_embeddings().weight.device)  # type: ignore[arg-type]
    name = type(model).__name__
    right = _pass(model, "a row of tokens", input_ids=ids)
    found = _pass(model, "embeddings in place of tokens", inputs_embeds=model.get_input_embeddings()(ids))
    close = (1e-4 if model.dtype == torch.float32 else 2e-2) * float(right.abs().max())
    if not float((found - right).abs().max()) <= close:
        raise ModelError(f"model.view: {name} computes from more of its tokens than their embeddings")


def _pass(model: PreTrainedModel, what: str, **row: Tensor) -> Tensor:
    first = next(iter(row.values()))
    options: dict[str, Any] = {"attention_mask": first.new_ones(first.shape[:2], dtype=torch.int64)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    try:
        logits: Tensor = model(**row, **options).logits
        return logits.float()
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"model.view: {type(model).__name__} cannot read {what}: {first_line(error)}") from error


def _table(model: PreTrainedModel, folder: Path) -> Tensor:
    """The embedding's weights, from the files where they are not in memory."""
    weight = model.get_input_embeddings().weight
    if not weight.is_meta:
        return weight  # type: ignore[return-value]
    return Base([folder], model)[next(name for name, p in model.named_parameters() if p is weight)]


def _saved(folder: Path, shape: tuple[int, int], layer: int) -> Tensor:
    file = folder / PROMPT
    found = read(file).get(str(layer))
    if found is None or found.shape != shape:
        raise ModelError(f"{file}: it does not have {shape[0]} virtual tokens of {shape[1]} numbers for layer {layer}")
    return found
