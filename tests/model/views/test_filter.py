"""The filter view: what is chosen is trained, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import Federation, closed_data, tiny_net

from thinwire.keys import Key
from thinwire.methods.fedavg import FedAvg
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.views import Filter
from thinwire.train.local import Rule, train_locally


@pytest.mark.parametrize(
    ("parts", "chosen", "others"),
    [
        (
            ("norm", "layernorm", "ln", "bias"),
            ["model.norm.weight", "h.0.ln_1.weight", "a.input_layernorm.weight", "e.LayerNorm.bias", "q_proj.bias"],
            ["model.layers.0.self_attn.q_proj.weight", "enormous.weight", "biased.weight", "linear.weight"],
        ),
        (("lm_head",), ["lm_head.weight"], ["model.embed_tokens.weight", "head.weight"]),
        (("layers.",), [], ["model.layers.0.norm"]),
        (
            ("h.1.*", "head"),
            ["h.1.ln_1.weight", "h.1.mlp.bias", "head.weight"],
            ["h.11.bias", "a.h.1.bias", "lm.weight"],
        ),
    ],
)
def test_names_are_chosen_by_their_words(parts: tuple[str, ...], chosen: list[str], others: list[str]) -> None:
    view = Filter(parts=parts)
    assert [name for name in [*chosen, *others] if view._has(name)] == chosen


def test_only_what_is_chosen_is_trained(tmp_path: Path) -> None:
    plain = tiny_net(tmp_path)
    net = Net.open(str(tmp_path), view=Filter())
    assert net.names == tuple(name for name in plain.names if "norm" in name)
    assert net.view.trained(plain.model) == {name: tuple(p.shape) for name, p in net.parameters()}
    batches = closed_data(net, 16, 1).batches(Key.root(1), 4)
    train_locally(net.model, [p for _, p in net.parameters()], batches, Rule("adamw", 1e-2, 3))
    for name, parameter in net.model.named_parameters():
        assert torch.equal(parameter, plain.base[name]) != (name in net.names), name
    net.save(tmp_path / "out")
    assert torch.equal(Net.open(str(tmp_path / "out")).base["model.norm.weight"], net.parameter("model.norm.weight"))


def test_a_view_that_hits_nothing_is_refused_in_a_line(tmp_path: Path) -> None:
    tiny_net(tmp_path)
    with pytest.raises(ModelError, match=r"model.view.parts: no parameter is called c_attn; there are: .*q_proj"):
        Net.open(str(tmp_path), view=Filter(parts=("c_attn",)))


@pytest.mark.parametrize("parts", [("norm",), ("*.self_attn.*",), ("embed_tokens",), ("*",)])
def test_fedpeft_is_fedavg_on_the_part(parts: tuple[str, ...], tmp_path: Path) -> None:
    """What is outside keeps its bits and is in no frame; all of the model is plain FedAvg, bit for bit."""
    plain = tiny_net(tmp_path / "start")
    net = Net.open(str(tmp_path / "start"), view=Filter(parts=parts), remember=True)
    method = FedAvg(lr=1e-2, steps=2, batch_size=4)
    mine = Federation(method, net, tmp_path / "mine", rounds=2).run()
    method.materialise(mine.state, net)
    for name, parameter in net.model.named_parameters():
        assert torch.equal(parameter, plain.base[name]) != (name in net.names), name
    assert mine.history[0].visits[0].bytes_up == pytest.approx(4 * net.size, abs=100 * len(net.names) + 100)
    if parts == ("*",):
        theirs = Federation(method, plain, tmp_path / "theirs", rounds=2).run()
        assert all(torch.equal(mine.state.weights[name], tensor) for name, tensor in theirs.state.weights.items())
        assert mine.history[1].ledger == theirs.history[1].ledger
