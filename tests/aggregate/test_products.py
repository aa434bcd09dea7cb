"""Products of thin factors against the dense matrices that are not formed elsewhere."""

from __future__ import annotations

import pytest
import torch

from thinwire.aggregate.mean import Update
from thinwire.aggregate.products import Pair, added, best, best_of, decomposed, joined, norm, weighed
from thinwire.aggregate.stack import Stack

SHAPES = [(6, 20, 12), (12, 20, 8), (30, 20, 12), (1, 5, 5)]  # rank, in, out; ranks beyond the sides too


def pair_of(rank: int, taken: int, given: int, seed: int = 0) -> Pair:
    draw = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, taken, generator=draw), torch.randn(rank, given, generator=draw))


def dense(pair: Pair) -> torch.Tensor:
    return pair.right.double().T @ pair.left.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_added_is_the_weighted_product(shape: tuple[int, int, int]) -> None:
    pair, shares = pair_of(*shape), torch.linspace(-1, 2, shape[0], dtype=torch.float64)
    matrix = torch.ones(shape[2], shape[1], dtype=torch.float64)
    found = added(matrix, pair, shares)
    torch.testing.assert_close(found, 1 + pair.right.double().T @ (shares[:, None] * pair.left.double()))
    assert torch.equal(matrix, torch.ones_like(matrix))
    assert added(matrix.bfloat16(), pair, shares).dtype == torch.bfloat16


def test_a_sum_is_one_rounding_and_its_order_that_of_the_rows() -> None:
    """What cancels in float32 does not: 2^30 and 1 and -2^30 add up to 1."""
    pair = Pair(torch.ones(3, 1), torch.tensor([[2.0**30], [1.0], [-(2.0**30)]]))
    assert added(torch.zeros(1, 1), pair, torch.ones(3)).item() == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_decomposition_is_the_dense_matrix_s(shape: tuple[int, int, int]) -> None:
    pair = pair_of(*shape)
    u, values, v = decomposed(pair)
    torch.testing.assert_close(u.T @ torch.diag(values) @ v, dense(pair))
    wanted = torch.linalg.svdvals(dense(pair))[: values.numel()]
    torch.testing.assert_close(values, wanted)
    torch.testing.assert_close(v @ v.T, torch.eye(values.numel(), dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_best_of_a_rank_is_eckart_and_young_s(rank: int) -> None:
    pair = pair_of(6, 20, 12)
    whole = dense(pair)
    lost = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
    for found in (best(pair, rank), best_of(whole, rank)):
        torch.testing.assert_close((dense(found) - whole).norm(), lost, atol=1e-9, rtol=1e-9)
        assert found.left.shape[0] == rank


def test_no_more_directions_than_rows() -> None:
    with pytest.raises(ValueError, match="6 rows have no 7 directions"):
        best(pair_of(6, 20, 12), 7)


def test_the_norm_of_a_product() -> None:
    assert norm(pair_of(6, 20, 12)) == pytest.approx(float(dense(pair_of(6, 20, 12)).norm()), rel=1e-12)


def test_joined_rows_are_the_sum_of_products() -> None:
    one, two = pair_of(6, 20, 12), pair_of(2, 20, 12, seed=1)
    torch.testing.assert_close(dense(joined(one, two)), dense(one) + dense(two))


def test_the_mean_of_equally_many_rows() -> None:
    rows, shares = torch.randn(6, 4), torch.tensor([0.25, 0.25, 0.75, 0.75, 0.0, 0.0])
    torch.testing.assert_close(weighed(rows, shares, 3), (0.25 * rows[:2] + 0.75 * rows[2:4]).double())


def test_a_stack_keeps_every_reply_and_what_they_report() -> None:
    rows = [torch.full((i + 1, 2), float(i)) for i in range(3)]
    updates = [(i, Update({"a": rows[i]}, i + 1.0, loss=float(i), skipped=i)) for i in range(3)]
    found, metrics = Stack()(iter(updates))
    assert found["a"].tolist() == [[0.0] * 2] + [[1.0] * 2] * 2 + [[2.0] * 2] * 3
    assert metrics == {"loss": pytest.approx((0 + 2 * 1 + 3 * 2) / 6), "skipped": 3}
    assert Stack()(iter([])) == ({}, {})
