"""What a model's files hold against its config: tensors without a place, of other kinds, that are no numbers, tied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_folder, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from thinwire.model.errors import ModelError
from thinwire.model.net import Net

QUERY = "model.layers.0.self_attn.q_proj.weight"
ROWS = "model.embed_tokens.weight"


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], Any], **config: Any) -> str:
    """The tiny model's folder with another file and config."""
    tiny_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))
    return str(folder)


def same_as_plain(net: Net, folder: str) -> bool:
    ids = torch.arange(60, 100)[None]
    with torch.no_grad():
        return torch.equal(
            net.model(input_ids=ids).logits, AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
        )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda held: held.update({f"{QUERY[:-6]}bias": torch.ones(32)}),
            "hold .*q_proj.bias, which .* has no place for",
        ),
        (lambda held: held.update({f"{QUERY}_scale_inv": torch.ones(1)}), "weight_scale_inv, which"),
        (lambda held: held.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}), r"layers\.2\.mlp"),
        (lambda held: held.update({QUERY: (held[QUERY] * 100).to(torch.int8)}), "q_proj.weight in .* is of I8"),
        (lambda held: held[QUERY][0].fill_(torch.nan), "not all numbers: .*q_proj.weight holds NaN"),
        (lambda held: held[QUERY][3, 3].fill_(torch.inf), "not all numbers: .*q_proj.weight holds NaN"),
        (lambda held: held.update({QUERY: held[QUERY][:16]}), r"q_proj.weight is \[16, 32\] in its weights"),
    ],
)
def test_files_that_are_another_models(edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        Net.open(edited(tmp_path, edit))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_size_of_vocabulary_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"embed_tokens.weight is \[259, 32\] in its weights, .* makes it \[300, 32\]"):
        Net.open(edited(tmp_path, lambda held: None, vocab_size=300))


@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.patch.weight"]
)
def test_what_may_be_left_aside(name: str, tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda held: held.update({name: torch.ones(4)}))
    assert same_as_plain(Net.open(folder), folder)


def test_a_base_models_names_are_the_models(tmp_path: Path) -> None:
    def bare(held: dict[str, Tensor]) -> None:
        for name in [*held]:
            held[name.removeprefix("model.")] = held.pop(name)

    folder = edited(tmp_path / "bare", bare)
    assert same_as_plain(Net.open(folder), folder)
    more = {"layers.2.mlp.up_proj.weight": torch.ones(2, 2)}
    folder = edited(tmp_path / "more", lambda held: (bare(held), held.update(more)))
    with pytest.raises(ModelError, match=r"hold layers\.2\.mlp\.up_proj\.weight"):
        Net.open(folder)


def test_weights_beyond_float16_are_reported(tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda held: held[QUERY][0].fill_(1e6))
    with pytest.raises(ModelError, match=r"model.dtype: .*q_proj.weight in .* is beyond what float16 holds"):
        Net.open(folder, "float16")
    Net.open(folder, "bfloat16")


@pytest.mark.parametrize("same", [True, False])
def test_a_head_stored_beside_tied_embeddings(same: bool, tmp_path: Path) -> None:
    """Two that differ are two, as in plain transformers; in a net without weights and in the export too."""

    def stored(held: dict[str, Tensor]) -> None:
        held["lm_head.weight"] = held[ROWS].clone() if same else held[ROWS].flip(0).clone()

    folder = edited(tmp_path / "start", stored)
    net, empty = Net.open(folder), Net.open(folder, hollow=True)
    assert same_as_plain(net, folder)
    assert ("lm_head.weight" in net.names) == (not same)
    assert net.names == empty.names
    net.save(tmp_path / "out")
    assert same_as_plain(net, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == same


@pytest.mark.parametrize("tokenizer", [False, True])
def test_an_adapter_is_no_model(tokenizer: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path / "start"))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "tuned")
    if tokenizer:
        tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    with pytest.raises(ModelError, match=rf"holds an adapter .*its base model {tmp_path / 'start'}"):
        Net.open(str(tmp_path / "tuned"))


def test_an_adapter_beside_a_model_is_not_put_over_it(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else", "peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"also holds an adapter \(adapter_config.json\)"):
        Net.open(str(folder))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert Net.open(str(folder)).names
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks weights .*pytorch_model.bin could run code.*save_pretrained"):
        Net.open(str(folder))


def test_code_of_a_models_own_is_not_run(tmp_path: Path) -> None:
    from thinwire.model.classifier import task_of

    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    folder = edited(tmp_path, lambda held: None, **own)
    assert same_as_plain(Net.open(folder), folder)  # transformers knows the type itself
    folder = edited(tmp_path, lambda held: None, model_type="own", **own)
    with pytest.raises(ModelError, match=r"brings code of its own .*never run"):
        task_of(Path(folder))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../../secret"}}'])
def test_an_index_that_names_no_files(index: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"cannot read .*index\.json"):
        Net.open(str(folder))
