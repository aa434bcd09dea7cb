"""A float32 model's products in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model

from thinwire import config
from thinwire.data.batch import Example, collate
from thinwire.model import autocast
from thinwire.train.objective import loss

CPU = torch.device("cpu")
needs_products = pytest.mark.skipif(
    not autocast.has_products(CPU), reason="this processor has no products of bfloat16 numbers"
)
BATCH = collate([Example((1, 2, 3), (4, 5, 6)), Example((9,), (8, 7))], 0)


@needs_products
def test_a_loss_and_its_gradient_are_rounded_and_near() -> None:
    model = tiny_model()
    rounded = copy.deepcopy(model)
    autocast.round_products(rounded, True)
    exact, near = loss(model, BATCH), loss(rounded, BATCH)
    exact.backward()
    near.backward()
    assert near.dtype == torch.float32
    assert near.item() != exact.item()
    assert near.item() == pytest.approx(exact.item(), rel=1e-2)
    for one, other in zip(model.parameters(), rounded.parameters(), strict=True):
        assert other.dtype == torch.float32
        assert one.grad is not None
        assert other.grad is not None
        assert other.grad.dtype == torch.float32
        assert float((one.grad - other.grad).norm()) <= 0.1 * float(one.grad.norm())


@needs_products
def test_short_attention_is_computed_as_float32_has_it() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 8, 4, generator=draw).bfloat16().requires_grad_() for _ in range(3))
    model = tiny_model()
    autocast.round_products(model, True)
    with autocast.passes(model, CPU):
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    right = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, right.to(torch.bfloat16))


def test_without_it_nothing_is_rounded() -> None:
    model = tiny_model()
    plain = loss(model, BATCH).item()
    autocast.round_products(model, True)
    autocast.round_products(model, False)
    assert loss(model, BATCH).item() == plain


def test_a_run_without_it_is_written_as_before_and_only_float32_takes_it() -> None:
    run = {"data": {"path": "rows.jsonl"}, "method": {"name": "fedavg"}, "model": {"autocast": True}}
    assert "autocast = true" in config.parse(run, "run.toml").to_toml()
    assert "autocast" not in config.parse({**run, "model": {}}, "run.toml").to_toml()
    with pytest.raises(config.ConfigError, match="autocast: is for float32 models"):
        config.parse({**run, "model": {"autocast": True, "dtype": "bfloat16"}}, "run.toml")
