"""Where the layers of a model are, and how they fall into blocks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from thinwire.model.blocks import blocks_of, layer_of, layers_of
from thinwire.model.errors import ModelError

SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (lambda: tiny_model(), "model.layers"),
        (lambda: tiny_model().model, "layers"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_head=2, n_layer=2)), "transformer.h"),
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)), "gpt_neox.layers"),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "bert.encoder.layer"),
    ],
)
def test_the_list_of_layers_is_found(model: Any, path: str) -> None:
    found = model()
    assert layers_of(found) == path
    assert layers_of(found, path) == path
    owners = {layer_of(name, path) for name, _ in found.named_parameters()}
    assert owners == {*range(len(found.get_submodule(path))), None} or path == "layers"


class Stacks(nn.Module):
    def __init__(self, **lists: Any) -> None:
        super().__init__()
        for name, members in lists.items():
            setattr(self, name, nn.ModuleList(members))


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(2, 2) for _ in range(count)]


def test_it_is_the_longest_of_one_class_that_holds_parameters_and_lies_in_no_other() -> None:
    experts = [Stacks(experts=linears(7)) for _ in range(3)]
    mixed, empty = [*linears(5), nn.LayerNorm(2)], [nn.ReLU() for _ in range(6)]
    model: Any = Stacks(short=linears(2), layers=experts, mixed=mixed, empty=empty)
    assert layers_of(model) == "layers"
    assert layers_of(model, "layers.1.experts") == "layers.1.experts"  # who names it means it


@pytest.mark.parametrize("path", ["layers", "model", "model.layers.0", "", "model.layers.0.mlp", "no.such"])
def test_a_path_to_no_such_list_is_refused(path: str) -> None:
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM .*method\.layers"):
        layers_of(tiny_model(), path)


def test_a_model_without_one_list_is_refused() -> None:
    mixed: Any = Stacks(layers=[nn.Linear(2, 2), nn.LayerNorm(2)])
    with pytest.raises(ModelError, match=r"^Stacks .*method\.layers"):
        layers_of(mixed)
    with pytest.raises(ModelError, match=r"^Stacks .*method\.layers"):
        layers_of(mixed, "layers")
    two = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(ModelError, match=r"encoder\.block and decoder\.block: .*method\.layers"):
        layers_of(two)
    assert layers_of(two, "decoder.block") == "decoder.block"


def test_the_layer_of_a_name() -> None:
    assert layer_of("model.layers.12.mlp.up_proj.weight", "model.layers") == 12
    assert layer_of("model.layers.12.mlp.up_proj.weight", "layers") is None
    assert layer_of("model.layers_12.weight", "model.layers") is None
    assert layer_of("model.layers.norm.weight", "model.layers") is None
    assert layer_of("lm_head.weight", "model.layers") is None


@given(st.integers(1, 200), st.data())
def test_blocks_are_even_runs_of_all_layers(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    blocks = blocks_of(depth, count)
    assert [layer for block in blocks for layer in block] == list(range(depth))
    sizes = [len(block) for block in blocks]
    assert len(sizes) == count
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_blocks_that_cannot_be() -> None:
    assert blocks_of(5, 3) == (range(2), range(2, 4), range(4, 5))
    for count in (0, -1, 6):
        with pytest.raises(ValueError, match=rf"5 layers .*{count} blocks"):
            blocks_of(5, count)
