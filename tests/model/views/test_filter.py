"""The filter view: what is chosen is trained, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import closed_data, tiny_net

from thinwire.keys import Key
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
