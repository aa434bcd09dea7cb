"""Error feedback: nothing is lost, to the bit."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from thinwire.compress.catalogue import Code, Plain
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.topk import TopK
from thinwire.compress.feedback import DEBT, carried, debt_of, encode_with_debt, on_grid

CODES: list[Code] = [Blocks(1, 64), Blocks(4, 64), Blocks(8, 64), TopK(0.1), Plain()]


@pytest.mark.parametrize("code", CODES, ids=repr)
@settings(deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1.0), count=st.integers(1, 300))
def test_what_was_sent_and_what_is_owed_is_what_was_learnt(code: Code, seed: int, scale: float, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    debt = torch.zeros(count, dtype=torch.float64)
    learnt, sent = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for round in range(6):
        x = torch.randn(count, generator=generator) * scale
        data, decoded, debt = encode_with_debt(code, x, debt, round)
        assert torch.equal(decoded, code.decode(data, (count,), round))  # what the other end makes of it
        learnt, sent = learnt + on_grid(x), sent + on_grid(decoded)
    assert torch.equal(sent + debt, learnt)


def test_the_debt_of_one_bit_does_not_grow() -> None:
    generator, code = torch.Generator().manual_seed(0), Blocks(1, 256)
    debt, sizes = torch.zeros(1024, dtype=torch.float64), []
    for round in range(200):
        x = torch.randn(1024, generator=generator)
        _, _, debt = encode_with_debt(code, x, debt, round)
        sizes.append(float(debt.norm()))
    assert max(sizes[100:]) < 1.5 * max(sizes[:50])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_a_debt_is_carried_over(share: float) -> None:
    debt = on_grid(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    found = carried(debt, share)
    assert torch.allclose(found, debt * share, atol=2.0**-40, rtol=0)
    assert torch.equal(found, on_grid(found))
    assert (found is debt) == (share == 1)


def test_a_debt_of_other_numbers_is_none() -> None:
    x = torch.zeros(3)
    own = torch.ones(3, dtype=torch.float64)
    assert debt_of({DEBT: own}, x) is own
    for other in ({}, {DEBT: torch.ones(4, dtype=torch.float64)}, {DEBT: torch.ones(3)}):
        assert torch.equal(debt_of(other, x), torch.zeros(3, dtype=torch.float64))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode_with_debt(Blocks(1), torch.tensor([float("nan")]), torch.zeros(1, dtype=torch.float64), 0)
