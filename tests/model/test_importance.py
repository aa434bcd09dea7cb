"""Scores of layers, heads and channels against slow ones, and that scoring leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_shrink import CHANNELS, DEPTH, VOCABULARY, made
from torch import Tensor

from thinwire.model.importance import drop, groups, influence, keep, perplexity, taylor

SHAPES = ((3, 9), (2, 5))
BATCHES = [torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(5)) for shape in SHAPES]
causal = pytest.mark.parametrize("name", ["llama, tied", "llama, biases", "qwen2", "gemma3", "gpt2", "gpt-neox"])


def mean_loss(model: Any, ids: Tensor) -> Tensor:
    found = [
        -row.log_softmax(-1)[t, ids[r, t + 1]]
        for r, row in enumerate(model(input_ids=ids).logits)
        for t in range(ids.shape[1] - 1)
    ]
    return torch.stack(found).mean()


@causal
def test_influence_is_one_minus_the_mean_cosine(name: str) -> None:
    model, path = made(name)
    found = influence(model, path, BATCHES)
    bare = copy.deepcopy(model)
    for norm in ("norm", "ln_f", "final_layer_norm"):  # so that the last hidden states are those of the last layer
        if hasattr(bare.base_model, norm):
            setattr(bare.base_model, norm, torch.nn.Identity())
    cosines: list[list[float]] = [[] for _ in range(DEPTH)]
    with torch.no_grad():
        for ids in BATCHES:
            hidden = bare(input_ids=ids, output_hidden_states=True).hidden_states
            for layer, (before, after) in enumerate(pairwise(hidden)):
                for a, b in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True):
                    cosines[layer].append(float(a @ b / (a.norm() * b.norm())))
    assert found == pytest.approx([1 - sum(each) / len(each) for each in cosines], abs=1e-6)
    assert all(len(each) == 3 * 9 + 2 * 5 for each in cosines)
    assert max(found) - min(found) > 1e-3


@causal
def test_perplexity_is_the_loss_of_the_model_without_the_layer(name: str) -> None:
    model, path = made(name)
    found = perplexity(model, path, BATCHES)
    expected = []
    for layer in range(DEPTH):
        without = copy.deepcopy(model)
        without.get_submodule(path)[layer].forward = lambda hidden_states, *args, **kwargs: hidden_states
        with torch.no_grad():
            losses = [float(mean_loss(without, ids)) for ids in BATCHES]
        expected.append((losses[0] * 24 + losses[1] * 8) / 32)
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(found) - min(found) > 1e-3


def products(model: Any) -> dict[str, Tensor]:
    other = copy.deepcopy(model).requires_grad_(True)
    for ids in BATCHES:
        mean_loss(other, ids).backward()
    return {name: (p.detach() * p.grad).abs() for name, p in other.named_parameters() if p.grad is not None}


@causal
def test_taylor_is_the_sum_of_weight_times_gradient(name: str) -> None:
    model, path = made(name)
    by_name = products(model)
    expected = [
        sum(float(product.sum()) for name, product in by_name.items() if name.startswith(f"{path}.{layer}."))
        for layer in range(DEPTH)
    ]
    assert taylor(model, path, BATCHES) == pytest.approx(expected, rel=1e-4)


def of_llama(layer: dict[str, Tensor], head: int) -> float:
    """4 groups of 4 numbers a head; 8 or 4 heads of query."""
    query = len(layer["self_attn.q_proj.weight"]) // 4
    total = 0.0
    for name, rows in (("q_proj", query), ("k_proj", len(layer["self_attn.k_proj.weight"]) // 4), ("v_proj", 0)):
        rows = rows or len(layer["self_attn.v_proj.weight"]) // 4
        for row in range(head * rows, (head + 1) * rows):
            total += float(layer[f"self_attn.{name}.weight"][row].sum())
            total += float(layer[f"self_attn.{name}.bias"][row]) if f"self_attn.{name}.bias" in layer else 0
    return total + sum(
        float(layer["self_attn.o_proj.weight"][:, i].sum()) for i in range(head * query, (head + 1) * query)
    )


def of_llama_channel(layer: dict[str, Tensor], channel: int) -> float:
    total = float(layer["mlp.down_proj.weight"][:, channel].sum())
    for name in ("gate_proj", "up_proj"):
        total += float(layer[f"mlp.{name}.weight"][channel].sum())
        total += float(layer[f"mlp.{name}.bias"][channel]) if f"mlp.{name}.bias" in layer else 0
    return total


def of_gpt2(layer: dict[str, Tensor], head: int) -> float:
    total = 0.0
    for row in range(head * 4, head * 4 + 4):
        total += float(layer["attn.c_proj.weight"][row].sum())
        for column in (row, 16 + row, 32 + row):
            total += float(layer["attn.c_attn.weight"][:, column].sum() + layer["attn.c_attn.bias"][column])
    return total


def of_gpt2_channel(layer: dict[str, Tensor], channel: int) -> float:
    out = layer["mlp.c_proj.weight"][channel].sum()
    return float(out + layer["mlp.c_fc.weight"][:, channel].sum() + layer["mlp.c_fc.bias"][channel])


def of_bert(layer: dict[str, Tensor], head: int) -> float:
    total = 0.0
    for row in range(head * 4, head * 4 + 4):
        total += float(layer["attention.output.dense.weight"][:, row].sum())
        for name in ("query", "key", "value"):
            at = f"attention.self.{name}"
            total += float(layer[f"{at}.weight"][row].sum() + layer[f"{at}.bias"][row])
    return total


def of_bert_channel(layer: dict[str, Tensor], channel: int) -> float:
    out = layer["output.dense.weight"][:, channel].sum()
    return float(out + layer["intermediate.dense.weight"][channel].sum() + layer["intermediate.dense.bias"][channel])


@pytest.mark.parametrize(
    ("name", "head", "channel"),
    [
        ("llama", of_llama, of_llama_channel),
        ("llama, biases", of_llama, of_llama_channel),
        ("qwen2", of_llama, of_llama_channel),
        ("gpt2", of_gpt2, of_gpt2_channel),
        ("bert", of_bert, of_bert_channel),
    ],
)
def test_a_groups_importance_is_summed_over_all_that_goes_with_it(
    name: str, head: Callable[[dict[str, Tensor], int], float], channel: Callable[[dict[str, Tensor], int], float]
) -> None:
    model, path = made(name)
    found, by_name = groups(model, path, BATCHES), products(model)
    assert len(found) == DEPTH
    for index, (heads, channels) in enumerate(found):
        start = f"{path}.{index}."
        layer = {name.removeprefix(start): value for name, value in by_name.items() if name.startswith(start)}
        assert heads.dtype == channels.dtype == torch.float32
        assert heads.tolist() == pytest.approx([head(layer, i) for i in range(4)], rel=1e-4)
        assert channels.tolist() == pytest.approx([channel(layer, i) for i in range(CHANNELS)], rel=1e-4)


SCORES = [influence, perplexity, taylor, groups]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["llama, tied", "gpt2"])
def test_scoring_leaves_no_trace(score: Any, name: str) -> None:
    model, path = made(name)
    model.train()  # with dropout, in GPT-2
    model.get_submodule(path)[1].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    kept = next(p for p in model.parameters() if p.requires_grad)
    kept.grad = torch.ones_like(kept)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    generator = torch.random.get_rng_state()
    with torch.no_grad():
        first, second = score(model, path, BATCHES), score(model, path, BATCHES)
    assert str(first) == str(second)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert [p is kept for p in model.parameters()] == [p.grad is not None for p in model.parameters()]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("score", SCORES)
def test_a_pass_that_fails_leaves_no_trace_either(score: Any) -> None:
    model, path = made("llama")
    model.train()
    with pytest.raises(IndexError):
        score(model, path, [torch.full((1, 3), VOCABULARY)])
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_classifier_is_scored_by_the_class_that_it_finds_likeliest() -> None:
    """Slow: labels from the whole model, the model without a layer, gradients by backward()."""
    model, path = made("bert, classes")
    assert len(influence(model, path, BATCHES)) == DEPTH
    with torch.no_grad():
        labels = [model(input_ids=ids).logits.argmax(1) for ids in BATCHES]
    expected = []
    for layer in range(DEPTH):
        without = copy.deepcopy(model)
        without.get_submodule(path)[layer].forward = lambda hidden_states, *args, **kwargs: hidden_states
        with torch.no_grad():
            rows = [-without(input_ids=ids).logits.log_softmax(1) for ids in BATCHES]
        picked = [float(r[k]) for row, label in zip(rows, labels, strict=True) for r, k in zip(row, label, strict=True)]
        expected.append(sum(picked) / 5)
    assert perplexity(model, path, BATCHES) == pytest.approx(expected, rel=1e-5)
    other = copy.deepcopy(model).requires_grad_(True)
    for ids, label in zip(BATCHES, labels, strict=True):
        other(input_ids=ids, labels=label).loss.backward()
    by_name = {n: (p.detach() * p.grad).abs() for n, p in other.named_parameters() if p.grad is not None}
    sums = [
        sum(float(product.sum()) for name, product in by_name.items() if name.startswith(f"{path}.{layer}."))
        for layer in range(DEPTH)
    ]
    assert taylor(model, path, BATCHES) == pytest.approx(sums, rel=1e-4)
    heads, channels = groups(model, path, BATCHES)[1]
    up = sum(
        by_name[f"{path}.1.intermediate.dense.{kind}"].view(len(channels), -1).sum(1) for kind in ("weight", "bias")
    )
    torch.testing.assert_close(channels, up + by_name[f"{path}.1.output.dense.weight"].sum(0))
    assert len(heads) > 1


def test_what_cannot_be_scored_is_refused() -> None:
    model, path = made("llama")
    for score in SCORES:
        with pytest.raises(ValueError, match="no tokens"):
            score(model, path, [])
    for score in SCORES[1:]:
        with pytest.raises(ValueError, match="no tokens"):
            score(model, path, [torch.zeros(2, 1, dtype=torch.int64)])
    bare = made("bert, classes")[0].bert
    for score in SCORES[1:]:
        with pytest.raises(ValueError, match="BertModel predicts no tokens"):
            score(bare, "encoder.layer", BATCHES)
    neox, path = made("gpt-neox")
    with pytest.raises(ValueError, match="GPTNeoXLayer cannot be narrowed"):
        groups(neox, path, BATCHES)


def test_the_lowest_of_the_candidates_are_dropped() -> None:
    scores = [0.0, 5.0, 3.0, 3.0, 1.0, 0.5]
    assert drop(scores, range(6), 2) == (0, 5)
    assert drop(scores, [4, 3, 2, 1], 2) == (2, 4)
    assert drop(scores, [1, 2], 0) == ()
    assert drop(scores, [2, 1, 1], 2) == (1, 2)
    for count in (-1, 3):
        with pytest.raises(ValueError, match=f"{count} layers"):
            drop(scores, [1, 2, 2], count)
    with pytest.raises(ValueError, match="not a number"):
        drop([float("nan"), 1.0], [0, 1], 1)
    assert drop([float("nan"), 1.0, float("inf")], [1, 2], 1) == (1,)


def test_all_but_the_lowest_share_are_kept() -> None:
    importance = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert keep(importance, 0.0) == (0, 1, 2, 3)
    assert keep(importance, 0.25) == (0, 2, 3)
    assert keep(importance, 0.49) == (0, 2, 3)
    assert keep(importance, 0.5) == (0, 2)
    assert keep(importance, 1.0) == (0,)
    assert len(keep(torch.arange(100.0), 0.29)) == 71
    for bad in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="importance"):
            keep(bad, 0.5)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            keep(importance, share)
