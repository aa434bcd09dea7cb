"""The core view: C alone is trained, and computes what the merged weights do; U and V are of the key alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, closed_data
from tiny import tiny_encoder, tiny_folder, tiny_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel

from thinwire.core import Method
from thinwire.keys import Key
from thinwire.methods.cgfed import CGFed
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.model.errors import ModelError
from thinwire.model.load import load
from thinwire.model.net import Net
from thinwire.model.numbers import digest
from thinwire.model.views import Core, factors
from thinwire.model.views.factors import VIEW, Factored, merged
from thinwire.train.local import Rule, train_locally

TARGETS = ("q_proj", "v_proj", "down_proj")
IDS = torch.arange(24).view(2, 12)


def core_net(folder: Path, seed: int = 0, dtype: str = "float32", **settings: Any) -> Net:
    if not (folder / "config.json").exists():
        tiny_folder(folder)
    view = Core(rank=4, alpha=8.0, targets=TARGETS)
    return Net.open(str(folder), dtype, view=view, view_key=Key.root(seed), remember=True, **settings)


def fill(net: Net, size: float = 0.1) -> Net:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return net


def layers(net: Net) -> dict[str, Factored]:
    return {name: module for name, module in net.model.named_modules() if isinstance(module, Factored)}


def weights(layer: Factored) -> tuple[Tensor, Tensor, Tensor]:
    """V, C and U in float64."""
    v, u, c = (factor.weight.detach().double() for factor in layer.factors)
    return v, c, u


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found.double()


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return core_net(tmp_path / "start")


def test_the_cores_are_all_that_is_trained_and_begin_at_the_start_model(net: Net) -> None:
    assert len(net.names) == 2 * len(TARGETS)
    assert all(name.endswith(".lora_C.default.weight") and p.shape == (4, 4) for name, p in net.parameters())
    assert net.size == 2 * len(TARGETS) * 16
    assert torch.equal(logits(net.model), logits(tiny_model()))
    assert not net.adapted()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_weights_are_those_of_the_formula(tmp_path: Path, dtype: str) -> None:
    """W + (8 / 4) U C V in float64, entry by entry; all else stays to the bit."""
    net = fill(core_net(tmp_path / "start", dtype=dtype))
    kind = getattr(torch, dtype)
    start, found = tiny_model().to(kind).state_dict(), merged(net.model)
    assert set(found) == set(start)
    beside = layers(net)
    for name, tensor in found.items():
        layer = beside.get(name.removesuffix(".weight"))
        assert tensor.dtype == kind
        if layer is None:
            assert torch.equal(tensor, start[name]), name
            continue
        v, c, u = weights(layer)
        right = start[name].double() + 2.0 * torch.einsum("oi,ij,jn->on", u, c, v)
        torch.testing.assert_close(tensor.double(), right, rtol=0, atol=1e-6 if dtype == "float32" else 1e-2)
        assert (right - start[name].double()).abs().max() > 0.1


def test_the_gradient_is_the_merged_weights_through_the_chain_rule(net: Net) -> None:
    """dL/dC = scale U^T (dL/dW) V^T, with dL/dW autograd's on the plain model at the merged weights, in float64."""
    model = fill(net).model
    plain = tiny_model().double()
    leaves = {}
    for name, layer in layers(net).items():
        v, c, u = weights(layer)
        start = plain.get_parameter(f"{name}.weight").detach()
        leaves[f"{name}.weight"] = (start + layer.scale * u @ c @ v).requires_grad_()
    functional_call(plain, leaves, (), {"input_ids": IDS, "labels": IDS}).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in layers(net).items():
        v, _, u = weights(layer)
        whole = leaves[f"{name}.weight"].grad
        found = net.parameter(f"{name}.lora_C.default.weight").grad
        assert whole is not None
        assert found is not None
        right = layer.scale * u.T @ whole @ v.T
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-6)
        assert right.abs().max() > 1e-3
        assert all(p.grad is None for side in (layer.lora_A, layer.lora_B, layer.base_layer) for p in side.parameters())


def test_two_nets_of_one_key_are_equal_bit_for_bit_and_others_are_not(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    torch.manual_seed(7)
    one, two, other = (core_net(tmp_path / "start", seed) for seed in (0, 0, 1))
    torch.random.set_rng_state(before)
    assert one.state_sha256() == two.state_sha256()
    drawn: list[bytes] = []
    for name, layer in layers(one).items():
        for side in ("lora_A", "lora_B"):
            mine, its = (getattr(found[name], side)["default"].weight for found in (layers(two), layers(other)))
            assert torch.equal(mine, getattr(layer, side)["default"].weight)
            assert 0.2 < (mine != its).float().mean() < 0.8
            drawn.append(mine.detach().sign().numpy()[:4, :4].tobytes())
    assert len(set(drawn)) == len(drawn)  # no two layers share theirs


def test_a_net_without_weights_has_the_same_factors_and_cores(tmp_path: Path) -> None:
    whole, hollow = core_net(tmp_path / "start"), core_net(tmp_path / "start", hollow=True)
    assert hollow.names == whole.names
    assert all(layer.base_layer.weight.is_meta for layer in layers(hollow).values())
    assert digest(hollow) == digest(whole)


def test_the_factors_are_signs_as_large_as_is_promised(net: Net) -> None:
    for layer in layers(net).values():
        v, _, u = weights(layer)
        assert torch.equal(u.abs(), torch.ones_like(u))
        assert torch.equal(v.abs(), torch.full_like(v, v.shape[1] ** -0.5).float().double())
        assert abs(float(u.mean())) < 0.3
        assert abs(float(v.sign().mean())) < 0.3


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize(("taken", "given"), [(32, 32), (32, 1024), (1024, 32), (1024, 1024)])
def test_a_unit_of_the_core_moves_outputs_alike_whatever_the_layers_size(taken: int, given: int, rank: int) -> None:
    """Outputs of inputs of mean square 1: c alpha for entries +-c of the whole core, alpha / rank for one of 1."""
    model: Any = nn.Module()
    model.config, model.dtype, model.proj = GPT2Config(), torch.float32, nn.Linear(taken, given, bias=False)
    generator = torch.Generator().manual_seed(0)
    model.forward = lambda input_ids: model.proj(torch.zeros(1, taken))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "check_called", lambda *_: None)  # it is no language model to try
        patch.setattr(factors, "head_of", lambda _: {})
        factors.add_cores(model, rank, 3.0, ["proj"], Key.root(5))
    x = torch.randn((400, taken), generator=generator)
    start = model.proj.base_layer(x)
    core = model.proj.lora_C["default"].weight
    moves = []
    with torch.no_grad():
        for entries in (torch.randn((rank, rank), generator=generator).sign() * 0.5, torch.zeros((rank, rank))):
            core.copy_(entries)
            if not entries.any():
                core[0, 1] = 1.0
            moves.append(float((model.proj(x) - start).square().mean().sqrt()))
    assert moves[0] == pytest.approx(0.5 * 3.0, rel=0.35 if rank == 2 else 0.12)
    assert moves[1] == pytest.approx(3.0 / rank, rel=0.12)


def test_the_base_is_untouched_after_a_run_and_reset_brings_the_start_back(net: Net, tmp_path: Path) -> None:
    start = net.state_sha256()
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    federation = Federation(FedAvg(lr=1e-2, steps=2, batch_size=4), net, tmp_path / "run", rounds=1).run()
    federation.method.materialise(federation.state, net)
    for name, parameter in net.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in net.names), name
    net.reset()
    assert net.state_sha256() == start


@pytest.mark.parametrize(
    "method",
    [
        FedKSeed(seeds=64, lr=1e-3, eps=1e-3, steps=2, law="lowrank", together=True),
        CGFed(lr=1e-2, steps=2, batch_size=4, codec="eden", ratio=16),
    ],
    ids=lambda method: method.name,
)
def test_methods_of_few_bytes_train_it(method: Method, net: Net, tmp_path: Path) -> None:
    method.fits(net)
    start = net.state_sha256()
    federation = Federation(method, net, tmp_path / "run", rounds=1, sizes=(8, 8)).run()
    method.materialise(federation.state, net)
    assert all(visit.error is None for at in federation.history for visit in at.visits.values())
    assert net.state_sha256() != start
    assert torch.isfinite(logits(net.model)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_view_is_a_plain_model_and_an_adapter_for_peft(tmp_path: Path, dtype: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    net = fill(core_net(tmp_path / "start", dtype=dtype))
    before = net.state_sha256()
    net.save(tmp_path / "saved")
    assert net.state_sha256() == before
    found, kind = logits(net.model), getattr(torch, dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=kind)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=kind)
    assert not any("lora" in name for name in plain.state_dict())
    close = 1e-5 if dtype == "float32" else 3e-2
    assert (logits(start) - found).abs().max() > 5 * close
    torch.testing.assert_close(logits(plain), found, atol=close, rtol=0)
    adapted = peft.PeftModel.from_pretrained(start, tmp_path / "saved" / "adapter")
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == sum(
        factor.weight.numel() for layer in layers(net).values() for factor in layer.factors[:2]
    )
    torch.testing.assert_close(logits(adapted), found, atol=close, rtol=0)


def test_layers_that_hold_their_weights_transposed() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    plain = GPT2LMHeadModel(model.config).eval()
    Core(rank=4, alpha=8.0, targets=("c_attn",)).adapt(model, Key.root(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_C." in name:
                p.copy_(torch.arange(16.0).view(4, 4) / 50)
    start = logits(plain)
    plain.load_state_dict(merged(model))
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(plain) - start).abs().max() > 1e-2


def test_beside_a_quantised_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    net, whole = core_net(tmp_path / "start", bits=8), core_net(tmp_path / "start")
    assert net.names == whole.names
    for name, layer in layers(net).items():
        assert all(torch.equal(*pair) for pair in zip(weights(layer), weights(layers(whole)[name]), strict=True))
    start = logits(net.model)
    batches = closed_data(net, 16, 1).batches(Key.root(1), 4)
    train_locally(net.model, [p for _, p in net.parameters()], batches, Rule("adamw", 1e-2, 4))
    trained = logits(net.model)
    net.save(tmp_path / "saved")
    off = (logits(Net.open(str(tmp_path / "saved")).model) - trained).norm()
    assert off < 0.5 * (trained - start).norm()


def test_a_classifiers_head_is_trained_beside_it_and_shapes_are_known_without_weights(tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    view, classes = Core(rank=2, targets=("query", "dense")), ("a", "b")
    empty, _, _ = load(str(tmp_path / "encoder"), empty=True, classes=classes)
    net = Net.open(str(tmp_path / "encoder"), view=view, classes=classes, head_key=Key.root(0))
    assert view.trained(empty) == {name: tuple(p.shape) for name, p in net.parameters()}
    assert any(".lora_C." not in name for name in net.names)
    assert not any(".lora_A." in name or ".lora_B." in name for name in net.names)


def test_what_has_no_place_is_refused_in_a_line(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    with pytest.raises(ModelError) as missed:
        Net.open(str(tmp_path), view=Core(rank=4, targets=("q_proj", "c_attn")))
    assert str(missed.value).startswith(f"{VIEW}.targets: no linear layer is called c_attn; there are: down_proj, ")
    with pytest.raises(ModelError) as above:
        Net.open(str(tmp_path), view=Core(rank=17, targets=TARGETS))
    assert str(above.value) == f"{VIEW}.rank: 17 is more than model.layers.0.self_attn.v_proj has, which is 16 x 32"
    assert "\n" not in str(missed.value)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": -1.0}, {"targets": []}, {"scale": 1.0}])
def test_settings_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Core.model_validate(wrong)
