"""A gated MLP under factors keeps two matrices of its width and not four, and trains to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import closed_data
from tiny import tiny_folder
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import GPT2Config, GPT2LMHeadModel

from thinwire.keys import Key
from thinwire.model.net import Net
from thinwire.model.views import Core, Lora, Tied, factors, sparing
from thinwire.train.local import Rule, train_locally

TARGETS = ("q_proj", "gate_proj", "up_proj", "down_proj")
VIEWS: dict[str, Any] = {
    "lora": Lora(rank=3, alpha=6.0, targets=TARGETS),
    "core": Core(rank=4, alpha=8.0, targets=TARGETS),
    "tied": Tied(numbers=300, targets=TARGETS),
}


def trained(folder: Path, view: Any, dtype: str, recompute: bool = False) -> str:
    net = Net.open(str(folder), dtype, view=view)
    batches = closed_data(net, 16, 1).batches(Key.root(1), 4)
    rule = Rule("adamw", 1e-2, 3)
    local = train_locally(net.model, [p for _, p in net.parameters()], batches, rule, recompute=recompute)
    assert local.loss > 0
    return f"{local.loss} {net.state_sha256()}"


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("view", list(VIEWS))
def test_it_trains_to_the_same_bits(
    view: str, dtype: str, act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tiny_folder(tmp_path / "model", hidden_act=act), []
    spared = sparing.spare

    def counted(product: Any) -> bool:
        calls.append(found := spared(product))
        return found

    monkeypatch.setattr(sparing, "spare", counted)
    ours = trained(folder, VIEWS[view], dtype)
    assert sum(calls) == (3 * 2 if act != "relu" else 0)  # of three steps, each layer's last
    assert trained(folder, VIEWS[view], dtype, recompute=True) == ours
    monkeypatch.setattr(sparing, "spare", lambda product: False)
    assert trained(folder, VIEWS[view], dtype) == ours


@pytest.mark.parametrize("view", list(VIEWS))
def test_what_can_be_made_again_is_not_kept(view: str, tmp_path: Path) -> None:
    net, refs = Net.open(str(tiny_folder(tmp_path / "model")), view=VIEWS[view]), dict[str, StorageWeakRef]()
    mlp: Any = net.model.model.layers[0].mlp  # type: ignore[union-attr]

    def watch(name: str, module: nn.Module, at_input: bool) -> None:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            refs[name] = StorageWeakRef((args[0] if at_input else out).untyped_storage())

        module.register_forward_hook(hook)

    for name, module, at_input in (
        ("gate", mlp.gate_proj, False),
        ("up", mlp.up_proj, False),
        ("act", mlp.act_fn, False),
        ("product", mlp.down_proj, True),
    ):
        watch(name, module, at_input)
    ids = torch.arange(24).view(2, 12)
    loss = net.model(input_ids=ids, labels=ids).loss
    assert {name: ref.expired() for name, ref in refs.items()} == {
        "gate": False,
        "up": False,
        "act": True,
        "product": True,
    }
    loss.backward()
    assert all(ref.expired() for ref in refs.values())


def test_a_layer_after_no_such_product_is_let_be() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40))
    factors.add(model, 2, 4.0, ["c_proj", "c_fc"], Key.root(0))
    ids = torch.arange(10).view(1, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
