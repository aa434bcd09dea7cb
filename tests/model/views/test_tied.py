"""The tied view: the gradient is the chain rule's, the weights are what the numbers say, exports compute alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import closed_data
from tiny import tiny_folder
from torch import Tensor

from thinwire.keys import Key
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.views import Tied
from thinwire.model.views.tying import NAME, of
from thinwire.train.objective import loss

VIEWS = {
    "factors": Tied(numbers=300, targets=("q_proj", "v_proj")),
    "weights": Tied(numbers=300, over="weights"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_folder(folder)
    return folder


@pytest.fixture(params=list(VIEWS))
def net(request: pytest.FixtureRequest, folder: Path) -> Net:
    net = Net.open(str(folder), view=VIEWS[request.param])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        net.parameter(NAME).copy_(torch.randn(300, generator=generator) * 0.02)
    return net


def logits(net: Net) -> Tensor:
    with torch.no_grad():
        found: Tensor = net.model(input_ids=torch.arange(24).view(2, 12)).logits
    return found


def test_the_numbers_are_all_that_is_trained_and_begin_at_the_start_model(folder: Path) -> None:
    plain = logits(Net.open(str(folder)))
    for view in VIEWS.values():
        net = Net.open(str(folder), view=view)
        assert net.names == (NAME,)
        assert net.size == 300
        assert torch.equal(logits(net), plain)
        assert view.trained(Net.open(str(folder)).model) == {NAME: (300,)}


def test_the_gradient_is_the_chain_rules(net: Net) -> None:
    """Against autograd through entry = start + sign x numbers[index] itself; no follower keeps a gradient."""
    tying, ids = of(net.model), torch.arange(24).view(2, 12)
    net.model(input_ids=ids, labels=ids).loss.backward()
    found = net.parameter(NAME).grad
    assert found is not None
    assert all(p.grad is None for p in tying.followers.values())
    numbers = net.parameter(NAME).detach().clone().requires_grad_()
    entries = {}
    for stream, (name, parameter) in enumerate(tying.followers.items()):
        index, sign = tying.ties.signed(stream, parameter.numel())
        ties = torch.from_numpy(sign).float() * numbers[torch.from_numpy(index).long()]
        entries[name] = tying.base[name] + ties.view(parameter.shape)
    net.model._forward_pre_hooks.clear()
    torch.func.functional_call(net.model, entries, (), {"input_ids": ids, "labels": ids}).loss.backward()
    assert numbers.grad is not None
    assert torch.allclose(found, numbers.grad, rtol=1e-3, atol=1e-6)


def test_a_finite_difference_agrees(net: Net) -> None:
    batch = next(closed_data(net, 8, 1).batches(Key.root(1), 4))
    loss(net.model, batch).backward()
    numbers = net.parameter(NAME)
    assert numbers.grad is not None
    direction = numbers.grad / numbers.grad.norm()
    step = 1e-2
    with torch.no_grad():
        start, values = numbers.clone(), []
        for sign in (1, -1):
            numbers.copy_(start + sign * step * direction)
            values.append(float(loss(net.model, batch)))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(numbers.grad.norm()), rel=0.05)


def test_the_weights_follow_whatever_changed_the_numbers(net: Net) -> None:
    before = logits(net)
    digest = net.state_sha256()
    with torch.no_grad():
        net.parameter(NAME).data.neg_()  # an edit that torch does not count
    assert not torch.equal(logits(net), before)
    assert net.state_sha256() != digest
    with torch.no_grad():
        net.parameter(NAME).data.neg_()
    assert net.state_sha256() == digest
    assert torch.equal(logits(net), before)


def test_an_exported_model_computes_the_same(net: Net, tmp_path: Path) -> None:
    net.save(tmp_path / "out")
    plain = Net.open(str(tmp_path / "out"))
    assert NAME not in plain.names
    assert torch.allclose(logits(plain), logits(net), atol=1e-4)
    assert not any("tied" in name for name, _ in plain.model.named_parameters())


def test_an_adapter_of_tied_factors_is_one_for_peft(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    net = Net.open(str(folder), view=VIEWS["factors"])
    with torch.no_grad():
        net.parameter(NAME).fill_(0.05)
    net.save(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out" / "adapter"
    ).eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(24).view(2, 12)).logits
    assert torch.allclose(found, logits(net), atol=1e-5)


def test_another_key_is_another_map(folder: Path) -> None:
    nets = [Net.open(str(folder), view=VIEWS["weights"], view_key=Key.root(seed)) for seed in (0, 0, 1)]
    for net in nets:
        with torch.no_grad():
            net.parameter(NAME).fill_(0.01)
    found = [logits(net) for net in nets]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_view_that_hits_no_matrix_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="no linear layer is called c_attn"):
        Net.open(str(folder), view=Tied(targets=("c_attn",)))


@pytest.mark.parametrize("wrong", [{"numbers": 0}, {"numbers": 1 << 30}, {"over": "heads"}, {"rank": 0}])
def test_settings_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Tied.model_validate(wrong)
