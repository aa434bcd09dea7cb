"""The net: names, base, reset, hash, kept copy, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BOS, EOS, PAD, VOCABULARY, tiny_folder, tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from thinwire.model.errors import ModelError
from thinwire.model.load import load
from thinwire.model.net import Net
from thinwire.model.numbers import digest
from thinwire.model.views import View
from thinwire.model.views.lora import Lora
from thinwire.model.views.tied import Tied

SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, **SPECIAL)
    return seeded(lambda: GPT2LMHeadModel(config))


def qwen2(tied: bool = True) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **SPECIAL,
    )
    return seeded(lambda: Qwen2ForCausalLM(config))


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        **SPECIAL,
    )
    return seeded(lambda: MixtralForCausalLM(config))


def seeded(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_model,
    "llama-untied": lambda: tiny_model(tie_word_embeddings=False),
    "gpt2": gpt2,
    "qwen2": qwen2,
    "qwen2-untied": lambda: qwen2(tied=False),
    "mixtral": mixtral,
}


def saved(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def scribble(net: Net) -> None:
    with torch.no_grad():
        for _, p in net.parameters():
            p.fill_(7.0)


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return Net.open(str(tiny_folder(tmp_path / "m")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", MODELS)
def test_base_is_the_loaded_weights_bit_for_bit(tmp_path: Path, kind: str, dtype: str) -> None:
    net = Net.open(str(saved(MODELS[kind](), tmp_path / "m")), dtype)
    assert tuple(net.base) == net.names == tuple(name for name, _ in net.model.named_parameters())
    before = net.state_sha256()
    for name, p in net.parameters():
        assert net.base[name].dtype == p.dtype
        assert torch.equal(net.base[name], p), name
    scribble(net)
    assert net.state_sha256() != before
    net.reset()
    assert net.state_sha256() == before


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_net_is_the_same_model(tmp_path: Path, kind: str) -> None:
    net = Net.open(str(saved(MODELS[kind](), tmp_path / "m")))
    with torch.no_grad():
        for _, p in net.parameters():
            p.mul_(1.5)
    net.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, net.parameter(name)) for name, p in again.named_parameters())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
    assert net.model.config.use_cache is False
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == net.tokenizer.chat_template
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, net.model(ids).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_a_saved_net_replaces_a_model_and_nothing_else(net: Net, tmp_path: Path) -> None:
    net.save(tmp_path / "out")
    scribble(net)
    net.save(tmp_path / "out")
    assert (load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"] == 7).all()
    net.save(net.folder)  # its own start folder: the open maps of the old file stay good
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(ModelError, match="will not replace"):
        net.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "notes", "out"]


def test_a_failed_save_leaves_the_old_model(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net.save(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(net.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        net.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert net.model.config.use_cache is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_sharded_files(tmp_path: Path) -> None:
    folder = saved(tiny_model(tie_word_embeddings=False), tmp_path / "m", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    net = Net.open(str(folder))
    scribble(net)
    net.reset()
    assert all(
        torch.equal(p, net.parameter(name)) for name, p in tiny_model(tie_word_embeddings=False).named_parameters()
    )


def test_tied_weights_are_one_parameter(net: Net) -> None:
    assert "lm_head.weight" not in net.names
    assert net.parameter("model.embed_tokens.weight") is net.model.lm_head.weight
    assert net.size == sum(p.numel() for p in net.model.parameters())
    assert net.nbytes == 4 * net.size
    assert len(net.base) == len(net.names)


def test_the_file_may_hold_the_other_name_of_a_tied_pair_or_no_prefix(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = tiny_model(), tiny_tokenizer()
    net = Net(model, tokenizer, folder)
    assert torch.equal(net.base["model.embed_tokens.weight"], model.lm_head.weight)

    folder = saved(gpt2(), tmp_path / "g")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    net = Net.open(str(folder))
    assert net.base._places["transformer.wpe.weight"] == (folder / "model.safetensors", "wpe.weight")
    assert all(torch.equal(net.base[name], p) for name, p in net.parameters())


def test_start_weights_that_files_spell_otherwise_are_spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINWIRE_CACHE", str(tmp_path / "cache"))
    folder = saved(mixtral(), tmp_path / "m")
    net = Net.open(str(folder))
    assert net.folder == folder
    (spool,) = (tmp_path / "cache").iterdir()
    assert all(torch.equal(net.base[name], p) for name, p in net.parameters())
    del net
    assert not spool.exists()
    with pytest.raises(ModelError, match="no parameter"):
        Net.open(str(folder), trainable=lambda _: False)
    assert not list((tmp_path / "cache").iterdir())


def test_base_refuses_absent_and_misshapen_tensors(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    with pytest.raises(ModelError, match="shape"):
        Net(tiny_model(hidden_size=64), tiny_tokenizer(), folder)
    with pytest.raises(ModelError, match="lack"):
        Net(tiny_model(num_hidden_layers=3), tiny_tokenizer(), folder)


def test_an_edit_of_a_base_tensor_reaches_nothing(net: Net) -> None:
    name = net.names[0]
    net.base[name].zero_()
    assert torch.equal(net.base[name], net.parameter(name))
    assert "nothing" not in net.base
    with pytest.raises(KeyError):
        net.base["nothing"]


def test_only_chosen_parameters_are_trained_and_written(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    net = Net.open(str(folder), trainable=lambda name: "layers.1." in name)
    assert all(name.startswith("model.layers.1.") for name in net.names)
    assert net.size < sum(p.numel() for p in net.model.parameters())
    frozen = net.model.get_input_embeddings().weight
    assert not frozen.requires_grad
    with torch.no_grad():
        frozen.fill_(3.0)
    net.reset()
    net.rebuild(b"t", net.reset)
    assert (frozen == 3.0).all()
    # A tied parameter is chosen by either name.
    assert Net.open(str(folder), trainable=lambda name: name == "lm_head.weight").names == (
        "model.embed_tokens.weight",
    )


def test_parameters_frozen_before_are_not_in_names(tmp_path: Path) -> None:
    model, tokenizer, folder = load(str(tiny_folder(tmp_path / "m")))
    model.model.norm.weight.requires_grad_(False)
    assert "model.norm.weight" not in Net(model, tokenizer, folder).names


def test_a_resting_net_has_no_memory_and_is_filled_again(tmp_path: Path) -> None:
    net = Net.open(str(tiny_folder(tmp_path / "m")), trainable=lambda name: "layers.1" in name)
    before, frozen = (
        net.state_sha256(),
        {n: p.data_ptr() for n, p in net.model.named_parameters() if not p.requires_grad},
    )
    shapes = {name: (p.shape, p.dtype) for name, p in net.parameters()}
    net.rest()
    net.rest()
    held = {n: p.untyped_storage().nbytes() for n, p in net._model.named_parameters() if p.requires_grad}
    assert max(held.values()) <= 8
    assert net.size == sum(net.base[name].numel() for name in net.names)
    assert {name: (p.shape, p.dtype) for name, p in net.parameters()} == shapes
    assert all(p.is_contiguous() for _, p in net.parameters())
    net.reset()
    assert net.state_sha256() == before
    assert {n: p.data_ptr() for n, p in net.model.named_parameters() if not p.requires_grad} == frozen


def test_rebuild_keeps_one_copy(net: Net) -> None:
    calls: list[float] = []

    def fill(value: float) -> Callable[[], None]:
        def build() -> None:
            calls.append(value)
            with torch.no_grad():
                for _, p in net.parameters():
                    p.fill_(value)

        return build

    def value() -> float:
        (found,) = {float(p.detach().flatten()[0]) for _, p in net.parameters()}
        return found

    net.remember = True
    pointers = [p.data_ptr() for _, p in net.parameters()]
    net.rebuild(b"a", fill(1.0))
    scribble(net)
    net.rebuild(b"a", fill(1.0))
    assert (calls, value()) == ([1.0], 1.0)
    net.rebuild(b"b", fill(2.0))
    scribble(net)
    net.rebuild(b"b", fill(2.0))
    assert (calls, value()) == ([1.0, 2.0], 2.0)
    net.rebuild(b"a", fill(1.0))  # only the last one was kept
    assert calls == [1.0, 2.0, 1.0]

    def broken() -> None:
        scribble(net)
        raise OSError

    with pytest.raises(OSError):
        net.rebuild(b"c", broken)
    net.rebuild(b"a", fill(1.0))
    assert (calls, value()) == ([1.0, 2.0, 1.0], 1.0)
    net.forget()
    net.rebuild(b"a", fill(1.0))
    assert calls == [1.0, 2.0, 1.0, 1.0]
    net.remember = False
    net.forget()
    net.rebuild(b"d", fill(4.0))
    net.rebuild(b"d", fill(4.0))
    assert calls[-2:] == [4.0, 4.0]
    assert pointers == [p.data_ptr() for _, p in net.parameters()]


def test_the_hash_is_of_names_and_values_alone(tmp_path: Path, net: Net) -> None:
    assert Net.open(str(tiny_folder(tmp_path / "same"))).state_sha256() == net.state_sha256()
    assert Net.open(str(tiny_folder(tmp_path / "other", seed=1))).state_sha256() != net.state_sha256()
    before = net.state_sha256()
    with torch.no_grad():
        weight = net.parameter("model.norm.weight")
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    assert net.state_sha256() != before


@pytest.mark.parametrize("make", [tiny_model, gpt2, qwen2, lambda: qwen2(tied=False)])
def test_a_hollow_net_is_the_net_without_memory(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    whole, hollow = Net.open(str(tmp_path), "bfloat16"), Net.open(str(tmp_path), "bfloat16", hollow=True)
    assert all(p.is_meta for p in hollow.model.parameters())
    assert not any(b.is_meta for b in hollow.model.buffers())
    assert {n: (p.shape, p.dtype) for n, p in hollow.parameters()} == {
        n: (p.shape, p.dtype) for n, p in whole.parameters()
    }
    assert hollow.names == whole.names
    for name in whole.names:
        assert torch.equal(hollow.base[name], whole.base[name]), name


@pytest.mark.parametrize(
    "view", [Lora(targets=("q_proj",)), Tied(numbers=64, rank=2), Tied(numbers=64, over="weights")]
)
def test_a_hollow_net_under_a_view_has_what_the_view_adds(view: View, tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    whole, hollow = (Net.open(str(tmp_path), view=view, hollow=empty) for empty in (False, True))
    assert hollow.names == whole.names
    assert hollow.size == whole.size
    assert not any(p.is_meta for _, p in hollow.parameters())
    assert sum(p.is_meta for p in hollow.model.parameters()) == len(list(load(tmp_path, empty=True)[0].parameters()))
    assert digest(hollow) == digest(whole)
