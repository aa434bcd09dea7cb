"""The views of a model: what is trained, what it computes, what it leaves behind, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from federation import closed_data
from peft import PeftModel
from tiny import BOS, CHOICES, EOS, VOCABULARY, tiny_encoder, tiny_folder, tiny_model, tiny_rows, write_jsonl
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from thinwire.keys import Key
from thinwire.model.errors import ModelError
from thinwire.model.load import load
from thinwire.model.net import Net
from thinwire.model.views import Full, Lora, View
from thinwire.model.views.factors import merged
from thinwire.train.local import Rule, train_locally

TARGETS = ("q_proj", "v_proj", "down_proj")


def lora_net(folder: Path, seed: int = 0, dtype: str = "float32") -> Net:
    if not (folder / "config.json").exists():
        tiny_folder(folder)
    view = Lora(rank=4, alpha=8.0, targets=TARGETS)
    return Net.open(str(folder), dtype, view=view, view_key=Key.root(seed))


def train(net: Net) -> None:
    batches = closed_data(net, 16, 1).batches(Key.root(1), 4)
    train_locally(net.model, [p for _, p in net.parameters()], batches, Rule("adamw", 1e-2, 4))


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return lora_net(tmp_path / "start")


def test_only_the_factors_are_trained(net: Net) -> None:
    assert len(net.names) == 2 * 2 * len(TARGETS)
    assert all(".lora_A." in name or ".lora_B." in name for name in net.names)
    assert all(p.requires_grad == (name in net.names) for name, p in net.model.named_parameters())


def test_the_view_begins_as_the_model(net: Net) -> None:
    ids = torch.arange(10)[None]
    assert torch.equal(net.model(ids).logits, tiny_model()(ids).logits)


def test_the_start_is_of_its_key_alone(tmp_path: Path, net: Net) -> None:
    before = torch.random.get_rng_state()
    torch.manual_seed(7)
    again, other = lora_net(tmp_path / "start"), lora_net(tmp_path / "start", seed=1)
    torch.random.set_rng_state(before)
    for name in net.names:
        assert torch.equal(net.base[name], again.base[name])
        assert torch.equal(net.base[name], other.base[name]) == (".lora_B." in name)
        if ".lora_A." in name:
            bound = net.base[name].shape[1] ** -0.5
            assert 0.5 * bound < net.base[name].abs().max() <= bound


def test_the_global_generator_stays_untouched(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    lora_net(tmp_path / "start")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reset_brings_the_start_back(net: Net) -> None:
    start = net.state_sha256()
    train(net)
    assert net.state_sha256() != start
    net.reset()
    assert net.state_sha256() == start


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_view_is_a_plain_model_and_an_adapter(tmp_path: Path, dtype: str) -> None:
    net = lora_net(tmp_path / "start", dtype=dtype)
    train(net)
    net.save(tmp_path / "saved")
    ids = torch.arange(12)[None]
    logits = net.model(ids).logits.float()
    kind = getattr(torch, dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=kind)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=kind)
    assert not any("lora" in name for name in plain.state_dict())
    close = 1e-5 if dtype == "float32" else 2e-2
    assert (start(ids).logits.float() - logits).abs().max() > 3 * close
    torch.testing.assert_close(plain(ids).logits.float(), logits, atol=close, rtol=0)
    adapted = PeftModel.from_pretrained(start, tmp_path / "saved" / "adapter")
    torch.testing.assert_close(adapted(ids).logits.float(), logits, atol=close, rtol=0)


def test_saving_changes_nothing(net: Net, tmp_path: Path) -> None:
    train(net)
    before = net.state_sha256()
    net.save(tmp_path / "saved")
    assert net.state_sha256() == before


def test_layers_that_hold_their_weights_transposed() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    plain = GPT2LMHeadModel(model.config).eval()
    Lora(rank=4, alpha=8.0, targets=("c_attn",)).adapt(model, Key.root(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.fill_(0.05)
    plain.load_state_dict(merged(model))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def test_a_target_that_is_no_layer_is_refused_with_those_that_are() -> None:
    with pytest.raises(ModelError, match=r"no linear layer is called c_attn; there are: down_proj, .*, v_proj"):
        Lora(rank=4, targets=("q_proj", "c_attn")).adapt(tiny_model(), Key.root(0))


def test_a_rank_above_a_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model.lora.rank: 17 is more than .*v_proj has, which is 16 x 32"):
        Lora(rank=17, targets=("q_proj", "v_proj")).adapt(tiny_model(), Key.root(0))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_beside_a_quantised_model(tmp_path: Path, bits: int, architecture: str) -> None:
    targets: tuple[str, ...] = TARGETS
    tiny_folder(tmp_path / "start")
    if architecture == "gpt2":  # which holds its weights transposed
        targets = ("c_attn", "c_fc")
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=1, n_head=2, bos_token_id=BOS)
        config.eos_token_id = EOS
        with torch.random.fork_rng(devices=[]):
            GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    view = Lora(rank=4, alpha=8.0, targets=targets)
    before = torch.random.get_rng_state()
    net = Net.open(str(tmp_path / "start"), view=view, bits=bits)
    assert torch.equal(torch.random.get_rng_state(), before)
    whole = Net.open(str(tmp_path / "start"), view=view)
    assert net.names == whole.names
    assert all(torch.equal(p, whole.base[name]) for name, p in net.parameters())
    size, floats = (sum(p.nbytes for n, p in x.model.named_parameters() if ".0." in n) for x in (net, whole))
    assert size < floats * (0.6 if bits == 8 else 0.5)
    ids = torch.arange(12)[None]
    start = net.model(ids).logits.detach()
    off = (start - whole.model(ids).logits).norm() / start.norm()
    assert 0 < off < (0.05 if bits == 8 else 0.3)
    train(net)
    trained = net.model(ids).logits.detach()
    assert (trained - start).norm() > 1e-3 * start.norm()
    net.save(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert "quantization_config" not in plain.config.to_dict()
    assert not any("lora" in name for name in plain.state_dict())
    # eight bits round what goes into a layer too
    assert (plain(ids).logits - trained).norm() < (0.05 if bits == 8 else 1e-5) * trained.norm()
    assert (plain(ids).logits - trained).norm() < 0.5 * (trained - start).norm()


@pytest.mark.parametrize("view", [Full(), Lora(rank=2, targets=TARGETS)], ids=lambda view: view.kind)
@pytest.mark.parametrize("encoder", [False, True])
def test_what_is_trained_is_known_of_a_model_without_weights(tmp_path: Path, view: View, encoder: bool) -> None:
    if encoder:
        tiny_encoder(tmp_path)
        if view.kind == "lora":
            view = Lora(rank=2, targets=("query", "dense"))
    else:
        tiny_folder(tmp_path)
    classes, key = (("a", "b"), Key.root(0)) if encoder else (None, None)
    empty, _, _ = load(str(tmp_path), empty=True, classes=classes)
    net = Net.open(str(tmp_path), view=view, classes=classes, head_key=key)
    assert net.view == view
    assert view.trained(empty) == {name: tuple(p.shape) for name, p in net.parameters()}


def test_each_layer_with_factors_is_to_be_found(net: Net) -> None:
    found = net.adapted()
    assert len(found) == 2 * len(TARGETS)
    ids = torch.arange(12)[None]
    train(net)
    whole = tiny_model()
    for layer, (weight, left, right, scale) in found.items():
        assert (left, right) == (f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight")
        own = net.model.get_parameter(weight)
        assert torch.equal(own, net.base[weight])
        with torch.no_grad():
            whole.get_parameter(f"{layer}.weight").add_(scale * net.parameter(right) @ net.parameter(left))
    torch.testing.assert_close(whole(ids).logits, net.model(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_frozen_weight_is_read_written_and_brought_back(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "start")
    net = Net.open(str(tmp_path / "start"), remember=True, view=Lora(rank=2, targets=TARGETS))
    name = next(iter(net.adapted().values())).weight
    start, frozen = net.state_sha256(), net.model.get_parameter(name)
    assert name not in net.names
    assert list(net.base) == list(net.names)

    def build() -> None:
        net.reset()
        net.write(name, net.base[name] + 1)
        net.write(net.names[0], net.base[net.names[0]] * 2)

    net.rebuild(b"one", build)
    assert torch.equal(frozen, net.base[name] + 1)
    assert not frozen.requires_grad
    moved = net.state_sha256()
    net.reset()
    assert net.state_sha256() == start
    net.rebuild(b"one", lambda: pytest.fail("it is kept"))
    assert net.state_sha256() == moved
    with pytest.raises(ModelError, match=r"has the shape .*, not \(3,\)"):
        net.write(name, torch.zeros(3))
    with pytest.raises(KeyError):
        net.write("nothing", torch.zeros(3))


def test_a_frozen_weight_that_the_files_hold_otherwise_is_not_written(tmp_path: Path) -> None:
    """Nothing could bring it back."""
    tiny_folder(tmp_path / "start")
    net = Net.open(str(tmp_path / "start"), view=Lora(rank=2, targets=TARGETS), bits=8)
    name = next(iter(net.adapted().values())).weight
    for ask in (lambda: net.base[name], lambda: net.write(name, torch.zeros(net.model.get_parameter(name).shape))):
        with pytest.raises(ModelError, match="is not in the model's files as the model has it"):
            ask()


@pytest.mark.parametrize("lora", ["", "lora.rank = 2"])
def test_a_run_in_floats_does_not_load_what_quantises(tmp_path: Path, lora: str) -> None:
    """bitsandbytes looks for a package of kernels as it is imported, and complains on the standard error."""
    tiny_folder(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(16, closed=True))
    (tmp_path / "run.toml").write_text(f"""
rounds = 1
data = {{ path = "{tmp_path}/rows.jsonl", clients = 2, max_length = 64, choices = {list(CHOICES)} }}
method = {{ name = "fedavg", steps = 1, batch_size = 2 }}
[model]
path = "{tmp_path}/model"
{lora}
""")
    code = """
import sys
from thinwire.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("quantising:", sorted({"bitsandbytes", "kernels"} & set(sys.modules)), file=sys.stderr)
"""
    command = [sys.executable, "-c", code, "run", tmp_path / "run.toml", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "quantising: []"
    assert "Failed" not in done.stderr
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors").exists() == bool(lora)
