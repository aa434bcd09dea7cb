"""Factors as one image: nothing lost, nothing padded, where the paper says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress.learned.lora_image import Image

HIDDEN, KV = 64, 16


def llama(layers: int, rank: int, hidden: int = HIDDEN, kv: int = HIDDEN) -> dict[str, tuple[int, int]]:
    shapes = {}
    for layer in range(layers):
        for module, out in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{layer}.{module}.lora_A"] = (rank, hidden)
            shapes[f"{layer}.{module}.lora_B"] = (out, rank)
    return shapes


def some(shapes: dict[str, tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", [Image.paper, Image.packed])
def test_round_trip_is_bitwise(kind: type) -> None:
    shapes = llama(2, 4)
    factors = some(shapes)
    image = kind(shapes)  # type: ignore[call-arg]
    stacked = image.stack(factors)
    assert tuple(stacked.shape) == (image.height, image.width)
    assert stacked.numel() == sum(math.prod(shape) for shape in shapes.values())
    back = image.unstack(stacked)
    assert set(back) == set(factors)
    assert all(torch.equal(back[name], factors[name]) for name in factors)


def test_the_papers_size_and_order() -> None:
    image = Image.paper(llama(32, 8, 4096, 4096))
    assert (image.height, image.width) == (4096, 2048)
    shapes = llama(2, 4)
    factors = some(shapes)
    stacked = Image.paper(shapes).stack(factors)
    assert torch.equal(stacked[:, :4], factors["0.q.lora_A"].T)
    assert torch.equal(stacked[:, 4:8], factors["0.q.lora_B"])
    assert torch.equal(stacked[:, -4:], factors["1.o.lora_B"])


def test_the_papers_image_refuses_grouped_queries_and_the_packed_one_takes_them() -> None:
    shapes = llama(30, 8, 576, 192)  # SmolLM2-135M
    with pytest.raises(ValueError, match=r"\[192, 576\]"):
        Image.paper(shapes)
    image = Image.packed(shapes)
    assert (image.height, image.width) == (1600, 576)
    factors = some(shapes)
    stacked = image.stack(factors)
    assert torch.equal(stacked[:8], factors["0.q.lora_A"])
    assert torch.equal(stacked[-3:].reshape(-1)[-1536:].view(8, 192), factors["29.v.lora_B"].T)
    assert all(torch.equal(t, factors[name]) for name, t in image.unstack(stacked).items())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.sampled_from([4, 8, 16]), st.sampled_from([64, 96, 128]), st.sampled_from([1, 2, 4]))
def test_packed_pads_nothing_or_reports_it(layers: int, rank: int, hidden: int, groups: int) -> None:
    shapes = llama(layers, rank, hidden, hidden // groups)
    count = sum(math.prod(shape) for shape in shapes.values())
    if not [w for w in range(64, count, 64) if count % w == 0 and count // w % 64 == 0]:
        with pytest.raises(ValueError, match=str(count)):
            Image.packed(shapes)
        return
    image = Image.packed(shapes)
    assert image.height % 64 == image.width % 64 == 0
    factors = some(shapes, layers)
    back = image.unstack(image.stack(factors))
    assert all(torch.equal(back[name], factors[name]) for name in factors)


def test_another_shape_is_refused() -> None:
    image = Image.packed(llama(2, 4))
    with pytest.raises(ValueError, match="not"):
        image.unstack(torch.zeros(64, 128))
    with pytest.raises(ValueError, match="two sides"):
        Image.packed({"bias": (64,)})
