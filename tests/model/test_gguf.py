"""GGUF files against plain transformers models of the same weights and config: what a file says is what is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from tiny import BOS, EOS, PAD, VOCABULARY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.resolve import resolve

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
Fields = Callable[[GGUFWriter], Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THINWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(kind: str, **fields: Any) -> PreTrainedModel:
    """A random model whose logits depend on each part of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | fields)))
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.data = 0.3 * noise if parameter.ndim > 1 else parameter.data + 0.1 * noise
    return model.eval()


def written(
    path: Path, arch: str, model: PreTrainedModel, fields: Fields = lambda writer: None, **more: np.ndarray
) -> Path:
    """The model as llama.cpp's converter writes it: its names, Llama's heads interleaved, Gemma's norms plus one."""
    config = model.config
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["ab" if index == 255 else token for token, index in vocabulary])
    writer.add_token_types([3 if index >= BOS else 1 for _, index in vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    fields(writer)
    names = get_tensor_name_map(
        next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, parameter in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        theirs, array = names.get_name(stem), parameter.detach().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for part, count in heads.items():
            if arch == "llama" and theirs.endswith(part):
                array = array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if arch.startswith("gemma") and "norm" in theirs:
            array = array + 1
        writer.add_tensor(f"{theirs}.{suffix}", np.ascontiguousarray(array))
    for name, array in more.items():
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scaled(how: RopeScalingType, factor: float, first: int | None = None) -> Fields:
    def fields(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(how)
        writer.add_rope_scaling_factor(factor)
        if first is not None:
            writer.add_rope_scaling_orig_ctx_len(first)

    return fields


def heads(size: int, then: Fields = lambda writer: None) -> Fields:
    def fields(writer: GGUFWriter) -> None:
        writer.add_key_length(size)
        writer.add_value_length(size)
        then(writer)

    return fields


def gemma3(writer: GGUFWriter) -> None:
    writer.add_sliding_window(8)
    writer.add_rope_freq_base(1e6)
    scaled(RopeScalingType.LINEAR, 8.0)(writer)
    writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)


def gemma2(writer: GGUFWriter) -> None:
    writer.add_sliding_window(8)
    writer.add_attn_logit_softcapping(20.0)
    writer.add_final_logit_softcapping(10.0)


THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | THETA
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
} | THETA
WIDE = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
CASES: dict[str, tuple[str, str, dict[str, Any], Fields]] = {
    "plain": ("llama", "llama", {}, lambda writer: None),
    "tied": ("llama", "llama", {"tie_word_embeddings": True}, lambda writer: None),
    "base": ("llama", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
             lambda writer: writer.add_rope_freq_base(500.0)),
    "linear": ("llama", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0} | THETA},
               scaled(RopeScalingType.LINEAR, 4.0)),
    "yarn": ("llama", "llama", {"rope_parameters": YARN}, scaled(RopeScalingType.YARN, 4.0, 64)),
    "biases": ("llama", "llama", {"attention_bias": True}, lambda writer: None),
    "heads": ("llama", "llama", {"head_dim": 16}, heads(16, lambda writer: writer.add_rope_dimension_count(16))),
    "qwen2-yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}, scaled(RopeScalingType.YARN, 4.0, 64)),
    "qwen3-heads": ("qwen3", "qwen3", {"head_dim": 16}, heads(16)),
    "gemma2": ("gemma2", "gemma2", WIDE | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
               heads(16, gemma2)),
    "gemma3": ("gemma3", "gemma3_text", WIDE | {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default"} | THETA},
    }, heads(16, gemma3)),
    "phi3-window": ("phi3", "phi3", {"sliding_window": 8}, lambda writer: writer.add_sliding_window(8)),
}  # fmt: skip


def same(file: Path, model: PreTrainedModel) -> bool:
    ids = torch.arange(60, 160)[None]
    with torch.no_grad():
        found, right = Net.open(str(file)).model(input_ids=ids).logits, model(input_ids=ids).logits
    return bool(torch.allclose(found, right, atol=1e-4 * float(right.abs().max())))


@pytest.mark.parametrize("case", list(CASES))
def test_what_a_file_says_is_what_is_computed(case: str, tmp_path: Path) -> None:
    arch, kind, config, fields = CASES[case]
    model = made(kind, **config)
    assert same(written(tmp_path / "m.gguf", arch, model, fields), model)


@pytest.mark.parametrize(("base", "first"), [(10000.0, 64), (500000.0, 8192)])
def test_the_factors_of_llama_3(base: float, first: int, tmp_path: Path) -> None:
    """A file holds what the scaling comes to, a tensor of factors; Llama 3's own are known by it."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = made("llama", rope_parameters=scaling | {"original_max_position_embeddings": first, "rope_theta": base})
    plain = 1 / base ** (torch.arange(0, 8, 2).float() / 8)
    freqs = (plain / model.model.rotary_emb.inv_freq).numpy()
    file = written(
        tmp_path / "m.gguf", "llama", model, lambda writer: writer.add_rope_freq_base(base), rope_freqs__weight=freqs
    )
    assert same(file, model)
    written_as = json.loads((resolve(str(file)) / "config.json").read_text())["rope_parameters"]["rope_type"]
    assert written_as == ("llama3" if first == 8192 else "longrope")


def test_the_two_factors_of_phi_3(tmp_path: Path) -> None:
    model = made("phi3", sliding_window=None, original_max_position_embeddings=64, rope_parameters=LONG)

    def fields(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_attn_factors((1 + np.log(4) / np.log(64)) ** 0.5)

    long, short = (np.array(LONG[f"{name}_factor"], np.float32) for name in ("long", "short"))
    more = {"rope_factors_long__weight": long, "rope_factors_short__weight": short}
    assert same(written(tmp_path / "m.gguf", "phi3", model, fields, **more), model)


@pytest.mark.parametrize(
    ("fields", "more", "message"),
    [
        (lambda writer: writer.add_sliding_window(8), {}, "attention.sliding_window = 8"),
        (lambda writer: writer.add_expert_count(4), {}, "expert_count = 4"),
        (lambda writer: writer.add_attn_logit_softcapping(20.0), {}, "attn_logit_softcapping = 20"),
        (lambda writer: writer.add_rope_dimension_count(4), {}, "."),
        (lambda writer: writer.add_causal_attention(False), {}, "attention.causal = False"),
        (lambda writer: None, {"blk__0__attn_q__lora": np.ones(4, np.float32)}, "holds blk.0.attn_q.lora"),
    ],
)
def test_what_has_no_place_is_refused(fields: Fields, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf", "llama", made("llama"), fields, **more)
    with pytest.raises(ModelError, match=message) as caught:
        resolve(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_lies_beside_a_file_is_not_for_it(tmp_path: Path) -> None:
    """transformers would take an adapter in the same folder for its own."""
    model = made("llama")
    file = written(tmp_path / "m.gguf", "llama", model)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    (tmp_path / "config.json").write_text("{")
    assert same(file, model)


def test_a_folder_made_before_all_fields_were_read_is_made_anew(tmp_path: Path) -> None:
    model = made("llama", rope_parameters={"rope_type": "linear", "factor": 4.0} | THETA)
    file = written(tmp_path / "m.gguf", "llama", model, scaled(RopeScalingType.LINEAR, 4.0))
    folder = resolve(str(file))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default"} | THETA}))
    assert not same(file, model)
    (folder / ".fields").unlink()
    assert same(file, model)
