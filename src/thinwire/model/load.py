"""Load a model into the process's own memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thinwire.model import classifier, embedder
from thinwire.model.errors import ModelError, first_line
from thinwire.model.files import check_files, check_shapes, settle_ties, unties
from thinwire.model.meta import hollow
from thinwire.model.quantised import placed_on, quantised_layers
from thinwire.model.resolve import resolve
from thinwire.model.tokens_and_generation import quiet, settle_generation, settle_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from thinwire.keys import Key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    dtype: str = "float32",
    empty: bool = False,
    classes: Sequence[str] | None = None,
    key: Key | None = None,
    device: str = "cpu",
    bits: int | None = None,
    embeds: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """The model, its tokenizer and its folder; if it is to be empty, its parameters have no memory (device meta).

    `path` is for `resolve`, or the folder that it has found, a Path. `dtype` is float32, bfloat16 or float16. The model
    is in eval mode (no dropout), on the CPU unless it spans all GPUs of the machine (`device` auto) or its linear
    layers are quantised to `bits`, 8 or 4 (on `device` then). It does not build a key-value cache unless it generates,
    and uses fused attention where its architecture has it (the default of transformers). The tokenizer has a pad token
    inside the model's vocabulary. With `classes` it is a classifier of texts into these, whose head is drawn from `key`
    where the folder has none; where it `embeds`, an encoder without a head. ModelError: see `resolve`; or the folder
    cannot be read, is quantised already, or its weights do not fill the model, have no place in it or are no numbers;
    or nothing that quantises is installed.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype is {dtype!r}; known are {', '.join(DTYPES)}")
    folder = path if isinstance(path, Path) else resolve(path)
    with quiet():
        if empty:
            model = _hollow_model(folder, DTYPES[dtype], classes, embeds)
        else:
            model = _read_model(folder, DTYPES[dtype], classes, key, placed_on(device, bits, DTYPES[dtype]), embeds)
        tokenizer = _read_tokenizer(folder)
    if not empty:
        _own(model)
    model.eval()
    model.config.use_cache = False
    settle_pad(model, tokenizer, folder)
    if classes is None and not embeds:
        settle_generation(model, tokenizer)
    else:
        model.config.pad_token_id = tokenizer.pad_token_id  # it marks where a text ends
        tokenizer.padding_side = "right"
    return model, tokenizer, folder


def _read_model(
    folder: Path,
    dtype: torch.dtype,
    classes: Sequence[str] | None,
    key: Key | None,
    placed: dict[str, Any],
    embeds: bool,
) -> PreTrainedModel:
    auto = _form(classes, embeds)
    try:
        if "quantization_config" in json.loads((folder / "config.json").read_text()):
            raise ModelError(f"the model in {folder} is quantised already: float weights are wanted")
        with torch.random.fork_rng(devices=[]):  # a head that the folder lacks is first drawn by transformers
            # Code that comes with a model is never run; passed here so that nobody is asked on the terminal.
            loaded: Any = auto.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are named below
                trust_remote_code=False,
                local_files_only=True,
                **_labels(classes),
                **placed,
            )
            model, info = loaded  # as output_loading_info has it
    except ModelError:
        raise
    except Exception as error:  # safetensors, json, config validation and torch each have their own
        raise ModelError(f"cannot load the model in {folder}: {first_line(error)}") from error
    if aside := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise ModelError(
            f"model.device: auto: the GPUs have no room for all of {folder}, such as {aside}, and what accelerate puts "
            "aside can be neither trained nor perturbed; take more GPUs, a smaller model.dtype, or model.bits"
        )
    check_shapes(info, f"the model in {folder}")
    for layer in quantised_layers(model).values():
        layer.support_avx512bf16_for_cpu = False  # or some CPUs would pack the weights anew, and round otherwise
    names = [name for name in info["missing_keys"] if not (embeds and name.startswith(embedder.POOLER))]
    absent = sorted(names, key=lambda name: (not classifier.of_head(model, name), name))
    if absent and classes is not None and key is not None:
        try:
            fresh = classifier.drawn(model, absent, key)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from None
        with torch.no_grad():
            for name, values in fresh.items():
                model.get_parameter(name).copy_(values)
    elif absent:
        # transformers would only warn, and train from random numbers
        which = absent[0] if len(absent) == 1 else f"{len(absent)} tensors that the model needs, such as {absent[0]}"
        raise ModelError(f"the weights in {folder} lack {which}")
    check_files(model, folder, info["unexpected_keys"])
    settle_ties(model)
    if embeds:
        embedder.settle(model, folder)
    ready: PreTrainedModel = model
    return ready


def _hollow_model(
    folder: Path, dtype: torch.dtype, classes: Sequence[str] | None = None, embeds: bool = False
) -> PreTrainedModel:
    from transformers import AutoConfig

    auto = _form(classes, embeds)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **_labels(classes))
        make = partial(auto.from_config, dtype=dtype, trust_remote_code=False)
        model = hollow(make, config)
        if unties(model, folder):
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
            model = hollow(make, config)
        if embeds:
            embedder.settle(model, folder)
        return model
    except Exception as error:  # as above
        raise ModelError(f"cannot read the model's config in {folder}: {first_line(error)}") from error


def _form(classes: Sequence[str] | None, embeds: bool) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if embeds:
        return AutoModel
    return AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification


def _labels(classes: Sequence[str] | None) -> dict[str, Any]:
    """The classes in a classifier's config."""
    if classes is None:
        return {}
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": "single_label_classification",
    }


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        raise ModelError(f"cannot load the tokenizer in {folder}: {first_line(error)}") from error


def _own(model: PreTrainedModel) -> None:
    """Move every parameter and buffer out of the file's memory map into ordinary memory, tensor by tensor.

    The map is private, so edits would not reach the file; but a file that changes would reach the weights,
    and its tensors start at any multiple of 8 bytes, where the rounding of a matrix product may differ from
    that on aligned memory.
    """
    quantised = {id(p) for layer in quantised_layers(model).values() for p in layer.parameters(recurse=False)}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in quantised or tensor.device.type != "cpu":
            continue  # in memory of its own already
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
