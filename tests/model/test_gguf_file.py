"""Nets as GGUF files: what is read from one again is the net, and what has no place in one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tiny import BOS, EOS, PAD, VOCABULARY, merging_tokenizer, tiny_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerBase

from thinwire.keys import Key
from thinwire.model import gguf_file
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.views import AnyView, Core, Filter, Full, Lora, Prompt, Tied

SIZES = {
    "vocab_size": VOCABULARY + 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SOFT = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
WIDE = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0} | THETA}),
    "yarn": ("llama", {"rope_parameters": YARN | THETA}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | THETA | {"original_max_position_embeddings": 64}}),
    "heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", WIDE | SOFT),
    "gemma3": ("gemma3_text", WIDE),
    "phi3": ("phi3", {"sliding_window": 8}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "gpt2": ("gpt2", {}),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINWIRE_CACHE", str(tmp_path / "cache"))


def made(path: Path, kind: str, tokenizer: PreTrainedTokenizerBase | None = None, **fields: Any) -> Path:
    """A folder with a random model whose logits depend on each part of it."""
    sizes = dict(SIZES)
    if kind == "gpt2":
        sizes.pop("num_key_value_heads")
        sizes.pop("intermediate_size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | fields)))
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.data = 0.3 * noise if parameter.ndim > 1 else parameter.data + 0.1 * noise
    model.save_pretrained(path)
    (tokenizer or merging_tokenizer()).save_pretrained(path)
    return path


def logits(net: Net) -> torch.Tensor:
    with torch.no_grad():
        return net.model(input_ids=torch.arange(60, 160)[None]).logits


def near(file: Path, net: Net, within: float) -> bool:
    right = logits(net)
    return bool((logits(Net.open(str(file))) - right).abs().max() <= within * right.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_is_read(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    net = Net.open(made(tmp_path / "model", kind, **fields))
    found = gguf_file.write(net, tmp_path / "m.gguf", "f32", "m")
    assert found.same == found.of == 256
    assert near(tmp_path / "m.gguf", net, 1e-4)


@pytest.mark.parametrize(("kind", "within", "bytes_each"), [("q8_0", 0.3, 1.2), ("f16", 0.01, 2.2), ("f32", 1e-4, 4.2)])
def test_fewer_bits_are_shorter_and_further_off(kind: str, within: float, bytes_each: float, tmp_path: Path) -> None:
    net = Net.open(made(tmp_path / "model", "llama", vocab_size=2048))
    found = gguf_file.write(net, tmp_path / "m.gguf", kind, "m")
    assert found.same > 0.8 * found.of
    assert near(tmp_path / "m.gguf", net, within)
    tensors = GGUFReader(tmp_path / "m.gguf").tensors
    assert sum(int(tensor.n_bytes) for tensor in tensors) < bytes_each * net.size
    assert {t.tensor_type.name for t in tensors} == {"F32"} | ({kind.upper()})


VIEWS: list[AnyView] = [
    Full(), Filter(parts=("norm",)), Lora(rank=2), Core(rank=4), Tied(numbers=100, rank=2),
    Tied(numbers=100, over="weights"),
]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: f"{view.kind}{getattr(view, 'over', '')}")
def test_what_a_view_has_trained_is_in_the_file(view: AnyView, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "llama")
    net = Net.open(folder, view=view, view_key=Key.root(0))
    before = logits(Net.open(folder))
    with torch.no_grad():
        for _, parameter in net.parameters():
            parameter += 0.2 * torch.sin(torch.arange(parameter.numel()).float()).view(parameter.shape)
    gguf_file.write(net, tmp_path / "m.gguf", "f32", "m")
    assert near(tmp_path / "m.gguf", net, 1e-3)
    assert (before - logits(net)).abs().max() > 0.01 * before.abs().max()


def digits() -> PreTrainedTokenizerBase:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return merging_tokenizer(pre_tokenizers.Sequence(steps))


def split(pattern: str) -> PreTrainedTokenizerBase:
    steps = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return merging_tokenizer(pre_tokenizers.Sequence(steps), bos=True)


def pieces() -> PreTrainedTokenizerBase:
    """In the manner of Llama 2's: pieces with a mark for spaces, and bytes to fall back on."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    tokens += [chr(97 + i) for i in range(26)] + ["th", "the", "\u2581t", "an", "and"]
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d"), ("\u2581", "t")]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def test_the_tokenizers(tmp_path: Path) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    cases = {
        "gpt-2": merging_tokenizer(),
        "smollm": digits(),
        "llama-bpe": split(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]),
        "qwen2": split(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]),
        None: pieces(),
    }
    for name, tokenizer in cases.items():
        net = Net.open(made(tmp_path / f"{name}", "llama", tokenizer, vocab_size=320))
        gguf_file.write(net, file := tmp_path / f"{name}.gguf", "f16", "m")
        fields = {key: field.contents() for key, field in GGUFReader(file).fields.items()}
        assert fields.get("tokenizer.ggml.pre") == name
        assert fields["tokenizer.ggml.add_bos_token"] == (tokenizer.encode("a")[0] == tokenizer.bos_token_id)
        assert fields.get("tokenizer.chat_template") == tokenizer.chat_template
        assert len(fields["tokenizer.ggml.tokens"]) == 320
        again = Net.open(str(file)).tokenizer
        for text in ("and then the 20 them", "  the\n\nAnd 3.14 naïve"):
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text, add_special_tokens=False)).strip() == text.strip()


REFUSED: dict[str, tuple[str, dict[str, Any], PreTrainedTokenizerBase | None, str]] = {
    "architecture": ("gpt_neox", {}, None, "the architecture gpt_neox cannot be written; known are gemma2, "),
    "window": ("mistral", {"sliding_window": 8}, None, "no place for sliding_window = 8"),
    "activation": ("llama", {"hidden_act": "gelu"}, None, "no place for hidden_act = 'gelu'"),
    "scaling": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0} | THETA}, None, "as dynamic"),
    "attention": ("gemma2", WIDE | {"query_pre_attn_scalar": 7}, None, "no place for query_pre_attn_scalar = 7"),
    "merges": ("llama", {}, tiny_tokenizer(), "merges nothing"),
    "split": ("llama", {}, merging_tokenizer(pre_tokenizers.Whitespace()), "in a way that llama.cpp has no name for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    kind, fields, tokenizer, message = REFUSED[case]
    net = Net.open(made(tmp_path / "model", kind, tokenizer, **fields))
    with pytest.raises(ModelError, match=message) as caught:
        gguf_file.write(net, tmp_path / "m.gguf", "f16", "m")
    assert "\n" not in str(caught.value)


def test_virtual_tokens_are_refused(tmp_path: Path) -> None:
    net = Net.open(made(tmp_path / "model", "llama"), view=Prompt(tokens=2))
    with pytest.raises(ModelError, match="virtual tokens"):
        gguf_file.write(net, tmp_path / "m.gguf", "f16", "m")


def test_a_file_that_is_read_as_something_else_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are not interleaved: the shapes are right, and the model is another."""
    net = Net.open(made(tmp_path / "model", "llama"))
    monkeypatch.setattr(gguf_file, "_laid_out", lambda tensor, *_: tensor)
    with pytest.raises(ModelError, match=r"q_proj\.weight is read from the file as another tensor"):
        gguf_file.write(net, tmp_path / "m.gguf", "q8_0", "m")


@pytest.mark.real
def test_the_answers_of_the_real_model(tmp_path: Path) -> None:
    """Over 200 greedy tokens q8_0 goes on as the model does at 95 % of them and more."""
    net = Net.open("smollm2-135m-instruct")
    found = gguf_file.write(net, tmp_path / "m.gguf", "q8_0", "smollm2")
    assert found.same >= 0.95 * found.of
    again = Net.open(str(tmp_path / "m.gguf"))
    lines = (
        "Tell the story of a keeper of a lighthouse.",
        "Explain step by step how bread is baked.",
        "Describe what a doctor does on a working day.",
        "Write a letter to a friend on a journey by train.",
    )
    talks = [[{"role": "user", "content": line}] for line in lines]
    net.tokenizer.padding_side = "left"
    asked = net.tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        made = net.model.generate(**asked, max_new_tokens=50, do_sample=False, use_cache=True)
        assert made.shape[1] == asked["input_ids"].shape[1] + 50
        assert not (made[:, -50:] == net.tokenizer.eos_token_id).any()  # what would follow an end is nobody's answer
        seen = torch.cat([asked["attention_mask"], torch.ones(4, 49, dtype=torch.int64)], dim=1)
        next_ones = again.model(input_ids=made[:, :-1], attention_mask=seen).logits[:, -50:].argmax(-1)
    assert (next_ones == made[:, -50:]).sum() >= 190
