"""Low-rank directions: their law, and their replay, by tables or products, against a sum over seeds in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.perturb import matmul_replay, philox, table_replay
from thinwire.perturb.directions import Directions

NAME = "model.layers.0.mlp.up_proj.weight"
SEEDS = [5, 0, 33, 4095, 31]
COEFS = [0.3, -1e-3, 0.25, 0.7, -0.1]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def oracle(pool: Directions, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    total = scale * weight.double()
    for seed, coef in zip(SEEDS, COEFS, strict=True):
        total = total + coef * pool.direction(NAME, weight.shape, seed).double()
    return total


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_replay, "ROWS", 8)
    monkeypatch.setattr(table_replay, "ROWS", 8)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_direction_is_the_product_of_its_factors(rank: int) -> None:
    pool = Directions(7, "lowrank", rank)
    left, right = pool.factors(NAME, (30, 20), [4, 9])
    assert (left.shape, right.shape) == ((2, 30, rank), (2, 20, rank))
    assert set(left.unique().tolist()) == set(right.unique().tolist()) == {-1.0, 1.0}
    z = pool.direction(NAME, (30, 20), 9)
    torch.testing.assert_close(z, left[1] @ right[1].T / math.sqrt(rank))
    assert torch.linalg.matrix_rank(z) == rank
    assert torch.equal(pool.direction(NAME, (5, 6, 20), 9).view(30, 20), z)


@pytest.mark.parametrize("rank", [1, 4])
def test_elements_have_mean_0_variance_1_and_no_correlation(rank: int) -> None:
    pool = Directions(1, "lowrank", rank)
    z = torch.stack([pool.direction(NAME, (6, 4), seed).flatten() for seed in range(4000)])
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(4000)
    moments = z.T @ z / 4000
    assert (moments.diagonal() - 1).abs().max() < 0.12
    assert (moments - moments.diagonal().diag()).abs().max() < 5 / math.sqrt(4000)


def test_parameters_and_seeds_are_independent() -> None:
    pool = Directions(1, "lowrank")
    whole = [pool.direction(name, (200, 100), seed) for name in (NAME, "another") for seed in (0, 1, 31, 32)]
    for i, one in enumerate(whole):
        for other in whole[:i]:
            assert abs(float((one * other).mean())) < 0.05


@pytest.mark.parametrize("law", ["sign", "lowrank"])
def test_a_vector_has_signs(law: str) -> None:
    z = Directions(1, law).direction("model.norm.weight", (500,), 3)
    assert set(z.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (20, 7), (3, 10, 7), (0, 4), (4, 0)])
def test_replay_is_the_sum_over_seeds(shape: tuple[int, ...], dtype: torch.dtype, rank: int, small_tiles: None) -> None:
    pool = Directions(7, "lowrank", rank)
    weight = draw(*shape, dtype=dtype)
    before = weight.clone()
    found = pool.apply(weight, NAME, SEEDS, COEFS, scale=0.9)
    assert torch.equal(weight, before)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found.double(), oracle(pool, weight, 0.9), rtol=tolerance, atol=tolerance)
    assert torch.equal(pool.apply(weight, NAME, SEEDS, COEFS, scale=0.9, out=weight), found)
    assert torch.equal(weight, found)


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.view(4, 15, 20).transpose(0, 1)])
def test_tensors_that_are_not_contiguous(view: object, small_tiles: None) -> None:
    pool = Directions(7, "lowrank", 2)
    whole = draw(60, 20)
    weight = view(whole)  # type: ignore[operator]
    expected = pool.apply(weight.contiguous(), NAME, SEEDS, COEFS)
    assert torch.equal(pool.apply(weight, NAME, SEEDS, COEFS), expected)
    pool.apply(weight, NAME, SEEDS, COEFS, out=weight)
    assert torch.equal(weight, expected)


def test_no_seeds_leave_the_bits() -> None:
    weight = torch.tensor([[-0.0, 1.0]])
    found = Directions(7, "lowrank").apply(weight, NAME, [], [])
    assert torch.equal(found.view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("rank", [1, 2])
def test_the_bits_do_not_depend_on_the_threads(rank: int) -> None:
    pool = Directions(7, "lowrank", rank)
    weight = draw(1100, 576)
    seeds, before = list(range(200)), torch.get_num_threads()
    coefs = draw(200).tolist()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pool.apply(weight, NAME, seeds, coefs))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40),
    n=st.integers(1, 3 * table_replay.COLUMNS // 2),
    rank=st.integers(1, 3),
    seeds=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 70), min_size=1, max_size=12),
    cut=st.floats(0, 1),
)
def test_tables_give_the_bits_of_the_specification(
    height: int, n: int, rank: int, seeds: list[int], cut: float
) -> None:
    """Also with seeds that come again, and for some rows of a matrix."""
    weight, coefs = draw(height, n).numpy(), draw(len(seeds)).numpy()
    expected = table_replay.reference(weight, 7, 11, seeds, coefs, 0.9, rank)
    out, start = np.empty_like(weight), int(cut * (height - 1))
    table_replay.accumulate(weight, out, 7, 11, seeds, coefs, 0.9, rank)
    assert np.array_equal(out.view(np.int32), expected.view(np.int32))
    rows = weight[start:].copy()
    table_replay.accumulate(rows, rows, 7, 11, seeds, coefs, 0.9, rank, start, height)
    assert np.array_equal(rows.view(np.int32), expected[start:].view(np.int32))


def test_products_agree_with_tables() -> None:
    """What a GPU does, within the rounding of a product."""
    pool, weight, coefs = Directions(7, "lowrank", 2), draw(300, 200), draw(100).tolist()
    mine = pool.apply(weight, NAME, range(100), coefs)
    theirs = torch.empty_like(weight)
    spread = torch.tensor(coefs) / math.sqrt(2)
    pool._products(weight, theirs, philox.parameter_id(f"{NAME}#factors"), philox.check_seeds(range(100)), spread, 1.0)
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


def test_a_rank_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        Directions(1, "lowrank", 0)
