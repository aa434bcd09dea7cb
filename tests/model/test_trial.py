"""What a few tokens show of a model: positions that see what follows, and weights that are read past their layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOS, EOS, PAD, VOCABULARY, tiny_folder, tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertGenerationConfig,
    BertGenerationDecoder,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from thinwire.keys import Key
from thinwire.model.classifier import task_of
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.trial import check_causal, positions, reads_of
from thinwire.model.views import Lora

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
MAMBA = {"state_size": 8, "time_step_rank": 4}
MAMBA2 = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}


def made(kind: str, **fields: Any) -> PreTrainedModel:
    """A random model with weights so large that what it says depends on all that it reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert-generation":
            model = BertGenerationDecoder(BertGenerationConfig(**(SIZES | fields)))
        elif kind == "xlnet":
            model = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64))
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | fields)))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.15)
    return model.eval()


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def leak(model: PreTrainedModel) -> float:
    """By how much the last of twenty tokens moves the logits before it, in plain transformers."""
    first = torch.arange(60, 80)[None]
    other = first.clone()
    other[0, -1] = 99
    with torch.no_grad():
        return float((model(input_ids=first).logits - model(input_ids=other).logits)[0, :-1].abs().max())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "float32") for kind in ("bert-generation", "xlnet", "roformer", "xlm")] + [("bert-generation", "bfloat16")],
)
def test_a_model_whose_positions_see_what_follows_is_refused(kind: str, dtype: str, tmp_path: Path) -> None:
    model = made(kind)
    assert leak(model) > 0.1
    with pytest.raises(ModelError, match=r"see what follows them .* not causal"):
        Net.open(saved(model, tmp_path), dtype)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("bloom", {}),
        ("gemma3_text", {"sliding_window": 4, "head_dim": 8, "num_key_value_heads": 2}),
        ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
        ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
        ("bert-generation", {"is_decoder": True}),
        ("roformer", {"is_decoder": True}),
        ("mamba", MAMBA),
        ("rwkv", {"attention_hidden_size": 32}),
    ],
)
def test_a_causal_model_is_none(kind: str, fields: dict[str, Any]) -> None:
    model = made(kind, **fields)
    assert leak(model) < 1e-4
    check_causal(model, "here")
    check_causal(model.to(torch.bfloat16), "here")


def test_a_small_bias_towards_what_follows_is_seen_in_fresh_weights() -> None:
    """Not only where weights are large: a fresh encoder moves its logits by thousandths."""
    torch.manual_seed(0)
    model = BertGenerationDecoder(BertGenerationConfig(**SIZES)).eval()
    assert 0 < leak(model) < 0.05
    with pytest.raises(ModelError, match="see what follows"):
        check_causal(model, "here")


def test_the_check_leaves_the_generators_and_the_model_alone(tmp_path: Path) -> None:
    model = tiny_model()
    before, state = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    check_causal(model, "here")
    reads_of(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_weights_that_overflow_in_the_dtype_are_reported(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    folder = tmp_path / "m"
    saved(model, folder)
    with pytest.raises(ModelError, match=r"the logits of LlamaForCausalLM in torch.float16 are not finite"):
        Net.open(str(folder), "float16")
    Net.open(str(folder))


def test_a_context_without_end_is_none() -> None:
    assert positions(made("xlnet")) is None
    assert positions(made("llama")) == 64
    model = made("mamba", **MAMBA)
    model.config.max_position_embeddings = -1
    assert positions(model) is None


def test_an_encoder_and_a_model_of_two_halves_are_no_causal_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}')
    with pytest.raises(ModelError, match=r"RobertaForMaskedLM .* is an encoder, whose positions see what follows"):
        task_of(tmp_path, "causal")
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "is_decoder": true}')
    assert task_of(tmp_path, "causal") == "causal"
    (tmp_path / "config.json").write_text('{"model_type": "bart", "is_encoder_decoder": true}')
    with pytest.raises(ModelError, match="an encoder with a decoder"):
        task_of(tmp_path, "causal")


@pytest.mark.parametrize(
    ("kind", "fields", "past"),
    [
        ("llama", {}, set()),
        ("gpt2", {}, set()),
        ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}, set()),
        ("mamba", MAMBA, {"conv1d", "dt_proj"}),
        ("mamba2", MAMBA2, {"conv1d"}),
        ("jamba", {"num_experts": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4}, {"conv1d", "dt_proj"}),
    ],
)
def test_weights_that_are_read_past_their_layer(kind: str, fields: dict[str, Any], past: set[str]) -> None:
    found, called = reads_of(made(kind, **fields))
    assert {name.split(".")[-2] for name in found} == past
    assert called


@pytest.mark.parametrize("target", ["dt_proj", "out_proj"])
def test_factors_beside_a_layer_that_is_not_called_are_refused(target: str) -> None:
    model = made("mamba", **MAMBA)
    with pytest.raises(
        ModelError, match=rf"model.lora.targets: .* reads the weights of .*\.{target} and does not call"
    ):
        Lora(rank=2, targets=(target,)).adapt(model, Key.root(0))
    assert not hasattr(model, "peft_config")
    Lora(rank=2, targets=("in_proj",)).adapt(model, Key.root(0))


def test_a_head_that_no_file_holds_is_not_drawn(tmp_path: Path) -> None:
    """The transformer's folder alone; a key for heads is for classifiers."""
    model = tiny_model(tie_word_embeddings=False)
    for name, options in (("whole", {}), ("sharded", {"max_shard_size": "20KB"})):
        model.model.save_pretrained(tmp_path / name, **options)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        for hollow in (False, True):
            with pytest.raises(ModelError, match=r"lm_head\.weight"):
                Net.open(str(tmp_path / name), hollow=hollow, head_key=Key.root(0))
    tiny_model().model.save_pretrained(tmp_path / "tied")  # the embeddings are its head
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    net = Net.open(str(tmp_path / "tied"), head_key=Key.root(0))
    with torch.no_grad():
        ids = torch.arange(30)[None]
        assert torch.equal(net.model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)


def test_the_rows_that_tokens_have(tmp_path: Path) -> None:
    net = Net.open(str(tiny_folder(tmp_path)))
    assert net.rows == (VOCABULARY, VOCABULARY)
