"""The probe against in-place perturbation of the weights, and that it leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import closed_data, tiny_net
from tiny import VOCABULARY, tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, MixtralConfig, Qwen2Config

from thinwire.data.batch import IGNORE, Example, collate
from thinwire.keys import Key
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.views import Lora
from thinwire.perturb.directions import Directions
from thinwire.perturb.probe import Probe, check
from thinwire.train.objective import loss

DIRECTIONS = Directions(99)
LAWS = [Directions(99), Directions(99, "sign"), Directions(99, "lowrank"), Directions(99, "lowrank", 3)]
laws = pytest.mark.parametrize("pool", LAWS, ids=["gaussian", "sign", "lowrank", "lowrank 3"])
together = pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])


def net_of(kind: str, folder: Path) -> Net:
    if kind == "llama":
        return tiny_net(folder)
    if kind == "llama, untied":
        return tiny_net(folder, tie_word_embeddings=False)
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "bos_token_id": 256, "eos_token_id": 257}
    config: Any = {
        "gpt2": lambda: GPT2Config(**small, n_embd=32, n_head=4, n_layer=2),
        "qwen2": lambda: Qwen2Config(
            **small, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
        ),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Net.open(str(folder))


@together
@laws
@pytest.mark.parametrize("kind", ["llama", "llama, untied", "gpt2", "qwen2"])
def test_the_losses_are_those_of_perturbed_weights(kind: str, pool: Directions, together: bool, tmp_path: Path) -> None:
    net = net_of(kind, tmp_path)
    with torch.no_grad():
        for name, parameter in net.parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    start = {name: parameter.detach().clone() for name, parameter in net.parameters()}
    for data in (closed_data(net, 8, 0), replace(closed_data(net, 8, 0), candidates=None)):
        batch = next(data.batches(Key.root(0), 8))
        with Probe(net, pool, together) as probe:
            found = probe.losses(batch, [5, 37], 1e-2)
        expected = []
        for seed, step in ((5, 1e-2), (5, -1e-2), (37, 1e-2), (37, -1e-2)):
            for name, parameter in net.parameters():
                parameter.data.copy_(start[name])
                pool.apply(parameter.data, name, [seed], [step], out=parameter.data)
            with torch.no_grad():
                expected.append(float(loss(net.model, batch)))
        for name, parameter in net.parameters():
            parameter.data.copy_(start[name])
        assert [value for pair in found for value in pair] == pytest.approx(expected, rel=2e-6)
        assert abs(found[0][0] - found[0][1]) > 1e-4  # the probe did move something
        assert found[0] != found[1]


@together
@laws
def test_pairs_are_the_losses_of_each_example(pool: Directions, together: bool, tmp_path: Path) -> None:
    net = tiny_net(tmp_path)
    for data in (closed_data(net, 8, 0), replace(closed_data(net, 8, 0), candidates=None)):
        batch = next(data.batches(Key.root(0), 6))
        with Probe(net, pool, together) as probe:
            found, means = probe.pairs(batch, [5, 37], 1e-2), probe.losses(batch, [5, 37], 1e-2)
        assert (found.dtype, found.shape, found.requires_grad) == (torch.float64, (2, 2, 6), False)
        assert len(found.flatten(0, 1).unique(dim=0)) == 4
        if batch.kind == "open":
            tokens = (batch.labels != IGNORE).sum(1)
            found = found * tokens * len(tokens) / tokens.sum()
        torch.testing.assert_close(found.mean(2), torch.tensor(means, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@together
@laws
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_are_bit_identical_after_probes(
    dtype: str, pool: Directions, together: bool, tmp_path: Path
) -> None:
    net = tiny_net(tmp_path, dtype)
    before = net.state_sha256()
    places = [parameter.data_ptr() for _, parameter in net.parameters()]
    batch = next(closed_data(net, 8, 0).batches(Key.root(0), 4))
    with Probe(net, pool, together) as probe:
        for seed in range(5):
            probe.losses(batch, [seed], 1e-3)
            assert net.state_sha256() == before
    assert places == [parameter.data_ptr() for _, parameter in net.parameters()]
    assert not any("forward" in vars(module) for module in net.model.modules())


def test_a_module_that_holds_parameters_and_modules(tmp_path: Path) -> None:
    """Its rows cannot be distinguished inside it, so its probes run one by one."""
    net = tiny_net(tmp_path)
    net.model.model.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    net._parameters["model.extra"] = net.model.model.extra
    batch = next(closed_data(net, 8, 0).batches(Key.root(0), 8))
    with Probe(net, DIRECTIONS) as probe:
        ((plus, minus),) = probe.losses(batch, [1], 1e-2)
    assert plus != minus
    with pytest.raises(ValueError, match=r"^method\.together: "):
        Probe(net, DIRECTIONS, together=True)


def test_a_forward_pass_that_fails_leaves_the_weights_too(tmp_path: Path) -> None:
    net = tiny_net(tmp_path)
    before = net.state_sha256()
    batch = next(closed_data(net, 8, 0).batches(Key.root(0), 4))

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handles = [
        net.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail),
        net.model.model.layers[1].mlp.up_proj.register_forward_hook(fail),
    ]
    for handle in handles[::-1]:
        with pytest.raises(RuntimeError, match="no"), Probe(net, DIRECTIONS) as probe:
            probe.losses(batch, [1], 1e-3)
        handle.remove()
    assert net.state_sha256() == before
    with Probe(net, DIRECTIONS) as probe:  # and the net still works
        probe.losses(batch, [1], 1e-3)


def test_a_model_with_a_parameter_that_no_forward_pass_meets_is_refused(tmp_path: Path) -> None:
    net = tiny_net(tmp_path)
    batch = next(closed_data(net, 8, 0).batches(Key.root(0), 4))
    idle = torch.nn.Linear(2, 2)
    net.model.idle = idle
    net._parameters["idle.weight"] = idle.weight
    with pytest.raises(RuntimeError, match=r"idle.weight"), Probe(net, DIRECTIONS) as probe:
        probe.losses(batch, [1], 1e-3)


def test_the_difference_is_the_directional_derivative_to_second_order(tmp_path: Path) -> None:
    """|g - z . grad| = O(eps^2), in float64."""
    tiny_folder(tmp_path)
    net = Net.open(str(tmp_path))
    net.model.double()
    tokens = Key.root(0).integers(256, 64).tolist()
    batch = collate([Example(tuple(tokens[i : i + 12]), tuple(tokens[i + 12 : i + 16])) for i in range(0, 64, 16)], 0)
    loss(net.model, batch).backward()
    slope = sum(float((DIRECTIONS.direction(name, p.shape, 3).double() * p.grad).sum()) for name, p in net.parameters())
    errors = []
    with Probe(net, DIRECTIONS) as probe:
        for eps in (1e-2, 5e-3, 2.5e-3):
            ((plus, minus),) = probe.losses(batch, [3], eps)
            errors.append(abs((plus - minus) / (2 * eps) - slope))
    assert errors[2] < errors[1] < errors[0]
    assert 2.5 < errors[1] / errors[2] < 6  # a quarter at half the eps; the loss is taken in float32


def test_a_model_that_goes_round_its_layers_is_refused_before_it_is_probed(tmp_path: Path) -> None:
    """Mamba reads the weights of its convolution and does not call it; LoRA's factors beside others may be probed."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4, pad_token_id=258
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"fedzo perturbs .*MambaForCausalLM does not call the layer of .*conv1d"):
        check(Net.open(str(tmp_path)), DIRECTIONS, False, "fedzo")
    view = Lora(rank=2, alpha=2.0, targets=("in_proj",))
    check(Net.open(str(tmp_path), view=view), DIRECTIONS, False, "fedzo")


@together
@laws
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_can_be_probed_passes_the_check(kind: str, pool: Directions, together: bool, tmp_path: Path) -> None:
    net = net_of(kind, tmp_path)
    before = net.state_sha256()
    check(net, pool, together, "fedkseed")
    assert net.state_sha256() == before


def test_experts_that_several_sides_share_are_refused_together(tmp_path: Path) -> None:
    """They are given the tokens of all sides in one list; one side at a time they may be probed."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    net = Net.open(str(tmp_path))
    check(net, DIRECTIONS, False, "fedkseed")
    with pytest.raises(
        ModelError, match=r"^method\.together: fedkseed with together = true cannot probe .*: a module of .*holds both"
    ):
        check(net, DIRECTIONS, True, "fedkseed")
