"""Factors: against the best approximation of that rank, sizes as claimed, the same bits by any thread count."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.factors import BLOCK, Factors

DIGEST = "13972efc2c205dac"  # of what bytes decode to: what a change of it orphans is every recorded frame


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lowrank(m: int, n: int, rank: int, noise: float = 0.0) -> torch.Tensor:
    return draw(m, rank, seed=1) @ draw(rank, n, seed=2) / rank**0.5 + noise * draw(m, n, seed=3)


def back(codec: Factors, x: torch.Tensor, key: int = 5) -> torch.Tensor:
    return codec.decode(codec.encode(x, key), x.shape, key)


def left_over(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).square().sum() / x.square().sum())


def best(x: torch.Tensor, rank: int) -> float:
    """The error of the best matrix of that rank (Eckart and Young)."""
    values = torch.linalg.svdvals(x.double()).square()
    return float(values[rank:].sum() / values.sum())


@pytest.mark.parametrize(("bits", "room"), [(8, 0.01), (4, 0.03), (2, 0.25)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_close_to_the_best_of_its_rank(rank: int, bits: int, room: float) -> None:
    x = lowrank(192, 256, 16, noise=0.3)
    error = left_over(x, back(Factors(rank, bits), x))
    assert best(x, rank) <= error * (1 + 1e-6)
    assert error < best(x, rank) + room


def test_a_matrix_of_its_rank_comes_back() -> None:
    x = lowrank(200, 300, 3)
    assert left_over(x, back(Factors(4, 8), x)) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e30])
def test_the_size_of_the_numbers_does_not_matter(scale: float) -> None:
    x = lowrank(96, 160, 8, noise=0.1)
    assert left_over(x, back(Factors(8), x * scale) / scale) == pytest.approx(
        left_over(x, back(Factors(8), x)), abs=0.01
    )


@pytest.mark.parametrize("shape", [(96, 160), (8, 3, 40), (64, 65), (40,), (3, 5), (0,), (0, 7), (1, 1), ()])
@pytest.mark.parametrize("codec", [Factors(4), Factors(8, 8), Factors(2, 2)])
def test_bytes_are_as_many_as_it_says(codec: Factors, shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    data = codec.encode(x, 1)
    assert len(data) == codec.size(shape)
    assert codec.decode(data, shape, 1).shape == x.shape


def test_what_is_no_smaller_as_factors_is_in_8_bits() -> None:
    for shape in ((300,), (300, 4), (8, 8)):
        x = draw(*shape)
        assert Factors(8).encode(x, 3) == Blocks(8, BLOCK).encode(x, 3)


def test_nothing_stays_nothing() -> None:
    for shape in ((96, 160), (50,)):
        assert torch.equal(back(Factors(4), torch.zeros(shape)), torch.zeros(shape))


def test_the_product_is_summed_in_one_order_whatever_the_threads() -> None:
    codec, x = Factors(8), lowrank(150, 220, 8, noise=0.2)
    data, before = codec.encode(x, 2), torch.get_num_threads()
    side = codec._code.size(8 * 150)
    a, b = Blocks(4, BLOCK).decode(data[:side], (8, 150), 0), Blocks(4, BLOCK).decode(data[side:], (8, 220), 0)
    slow = torch.zeros(150, 220)
    for k in range(8):
        slow += a[k][:, None] * b[k][None, :]  # rounded after each product and each sum
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(codec.decode(data, x.shape, 2), slow)
    finally:
        torch.set_num_threads(before)


def test_decoded_bits_are_those_of_record() -> None:
    codec = Factors(4, 4)
    data = bytes((7 * i + 3) % 64 for i in range(codec.size((40, 90))))
    found = codec.decode(data, (40, 90), 0)
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest().startswith(DIGEST)


def test_with_error_feedback_all_arrives() -> None:
    codec, residue, arrived = Factors(4), torch.zeros(96, 96), torch.zeros(96, 96)
    wanted = draw(96, 96)  # of full rank
    errors = []
    for step in range(60):
        target = residue + (wanted if step == 0 else 0)
        sent = back(codec, target, step)
        arrived, residue = arrived + sent, target - sent
        errors.append(left_over(wanted, arrived))
    assert torch.allclose(arrived + residue, wanted, atol=1e-4)
    assert errors[0] > 0.7
    assert errors[-1] < 0.05


@pytest.mark.parametrize(("rank", "bits"), [(0, 4), (-1, 4), (4, 3), (4, 1)])
def test_what_it_does_not_have_is_refused(rank: int, bits: int) -> None:
    with pytest.raises(ValueError, match=r"rank|bits"):
        Factors(rank, bits)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    x = draw(96, 160)
    x[3, 4] = wrong
    with pytest.raises(ValueError, match="finite"):
        Factors(4).encode(x, 0)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=600), shape=st.sampled_from([(40, 60), (40,), (3, 7)]))
def test_any_bytes_give_a_finite_tensor_or_a_value_error(data: bytes, shape: tuple[int, ...]) -> None:
    with contextlib.suppress(ValueError):
        found = Factors(2, 4).decode(data, shape, 0)
        assert found.shape == shape
