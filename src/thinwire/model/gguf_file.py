"""Write a net as a GGUF file, and hold what is read from it again against the net before anybody gets it.

transformers reads such files (see `gguf`) and writes none; names and blocks of 32 weights are the package gguf's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from thinwire.model import classifier, gguf_fields, gguf_tokens
from thinwire.model.embedder import is_embedder
from thinwire.model.errors import ModelError
from thinwire.model.gguf import read
from thinwire.model.meta import hollow

if TYPE_CHECKING:
    from thinwire.model.net import Net

KINDS = {"q8_0": 7, "f16": 1, "f32": 0}  # how weights are held: llama.cpp's number of such a file
CLOSE = {"q8_0": 6e-3, "f16": 1e-3, "f32": 0.0}  # of the largest weight of a tensor, the most that one may be off by
READ = 256  # tokens of text, after each of which the two models' next are compared
LEAST = 0.5  # of them alike, or the file is none of the model


class Agreement(NamedTuple):
    """After how many tokens of a text the file's likeliest next token is the model's."""

    same: int
    of: int


def check_writable(net: Net) -> None:
    """Raise ModelError for a net that no GGUF file can hold."""
    kind = net.model.config.model_type
    if classifier.is_classifier(net.model):
        raise ModelError("GGUF: a classifier cannot be written, only a model that goes on with a text")
    if is_embedder(net.model):
        raise ModelError("GGUF: a model of embeddings cannot be written here, only one that goes on with a text")
    if net.view.front:
        raise ModelError("GGUF: there is no place for virtual tokens in front of a text; export the folder")
    if kind not in gguf_fields.ARCHITECTURES:
        known = ", ".join(sorted(gguf_fields.ARCHITECTURES))
        raise ModelError(f"GGUF: the architecture {kind} cannot be written; known are {known}")


def write(net: Net, file: Path, kind: str, name: str) -> Agreement:
    """Write the plain model that the net computes, and read it again; how far its answers are the net's.

    `kind`, of KINDS: what matrices are held in; vectors stay float32, and under q8_0 matrices whose rows are no
    multiple of 32 are float16. `name`: the model's. ModelError: it cannot be written, or what is read is not the net's.
    """
    check_writable(net)
    state = _state(net)
    _write(net, state, file, kind, name)
    return _check(net, state, file, kind)


def _write(net: Net, state: Mapping[str, Tensor], file: Path, kind: str, name: str) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    model: Any = net.model
    arch = gguf_fields.ARCHITECTURES[model.config.model_type]
    fields = gguf_fields.settings(model.config, arch)
    writer = GGUFWriter(file, arch)
    writer.add_name(name)
    writer.add_file_type(KINDS[kind])
    writer.add_quantization_version(2)
    add: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for field, value in fields.items():
        add[type(value)](f"{arch}.{field}", value)
    gguf_tokens.write(writer, net.tokenizer, net.rows[0])
    for theirs, tensor in _tensors(net, state, arch).items():
        array = tensor.float().cpu().contiguous().numpy()
        if array.ndim < 2 or kind == "f32" or "norm" in theirs:
            writer.add_tensor(theirs, array)
        elif kind == "q8_0" and array.shape[-1] % 32 == 0:
            q8_0 = GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, quants.quantize(array, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(theirs, array.clip(-65504, 65504).astype("float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(net: Net, state: Mapping[str, Tensor], file: Path, kind: str) -> Agreement:
    """Read the file as any other and hold it against the net: tokens, weights, settings, and then the next tokens.

    It takes the memory of the model once more, in float32.
    """
    again, tokenizer = read(file)
    text = resources.files("thinwire.model").joinpath("calibration.txt").read_text(encoding="utf-8")
    tokens = net.tokenizer.encode(text)
    if tokens != tokenizer.encode(text):
        raise ModelError("GGUF: the tokenizer that is read from the file splits a text otherwise than the model's")
    there = again.state_dict()
    for name, tensor in state.items():
        own, its = tensor.float().cpu(), there.get(name)
        off = float((its.float() - own).abs().max()) if its is not None and its.shape == own.shape else torch.inf
        if off > CLOSE[kind] * float(own.abs().max()) + 1e-6:
            raise ModelError(f"GGUF: {name} is read from the file as another tensor, so the file would be wrong")
    if (what := gguf_fields.lost(net.model, again)) is not None:
        raise ModelError(f"GGUF: the file has no place for {what} of the model's config")
    ids = torch.tensor([tokens[: min(READ, net.positions or READ)]])
    with torch.inference_mode():
        expected = net.model(input_ids=ids.to(net.device)).logits.argmax(-1).cpu()
        found = again(input_ids=ids).logits.argmax(-1)
    same = Agreement(int((expected == found).sum()), ids.numel())
    if same.same < LEAST * same.of:
        raise ModelError(f"GGUF: the file goes on as the model does after {same.same} of {same.of} tokens only")
    return same


def _state(net: Net) -> dict[str, Tensor]:
    """The plain model's tensors by name, without the head where it is the embedding."""
    with TemporaryDirectory() as aside:  # for an adapter, which is not wanted here
        state = net.view.export(net.model, Path(aside)) or net.model.state_dict()
    head = "lm_head.weight" if net.model.config.tie_word_embeddings else ""
    return {name: tensor for name, tensor in state.items() if name != head}


def _tensors(net: Net, state: Mapping[str, Tensor], arch: str) -> dict[str, Tensor]:
    """The same as llama.cpp names them and lays them out."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    config = net.model.config
    model: Any = hollow(partial(AutoModelForCausalLM.from_config, dtype=torch.float32), config)
    how: Any = TensorProcessor(config=config.to_dict())
    names = {ours: theirs for theirs, ours in get_gguf_hf_weights_map(model, how, arch).items()}
    found = {}
    for name, tensor in state.items():
        if name not in names:
            raise ModelError(f"GGUF: there is no place for {name} in a file of the architecture {arch}")
        found[names[name]] = _laid_out(tensor, names[name], arch, config)
    if (turned := gguf_fields.divisors(net.model)) is not None:
        found["rope_freqs.weight"] = turned
    return found


def _laid_out(tensor: Tensor, theirs: str, arch: str, config: Any) -> Tensor:
    """As the file has it: Llama's heads interleaved, Gemma's norms plus one, GPT-2's layers turned over."""
    stem = theirs.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    heads: Mapping[str, int | None] = {
        "attn_q": config.num_attention_heads,
        "attn_k": getattr(config, "num_key_value_heads", None),
    }
    if arch == "llama" and (count := heads.get(stem)):
        return tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    if arch.startswith("gemma") and theirs.endswith("norm.weight"):
        return tensor.float() + 1
    if arch == "gpt2" and theirs.endswith(".weight") and stem in ("attn_qkv", "ffn_down", "ffn_up", "attn_output"):
        return tensor.T
    return tensor
