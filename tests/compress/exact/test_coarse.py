"""Weights in few bits, predicted from older ones: what goes in comes out, small moves cost little, and damage shows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.exact import coarse

CODES = [Blocks(bits, block) for bits in (8, 7, 6, 4, 2, 1) for block in (128, 5)]


def normal(count: int, seed: int, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)  # the first example compiles
@given(
    st.sampled_from(CODES),
    st.integers(0, 700),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, 0.0, 1e-6, 1e-2, 1e3]),
    st.integers(0, 1000),
)
def test_round_trip(code: Blocks, count: int, dtype: torch.dtype, moved: float | None, seed: int) -> None:
    """From nothing, from the same, from weights that have moved a little, and from others altogether."""
    new = normal(count, seed).to(dtype)
    new[: count // 4] = 0
    old = None if moved is None else (new.float() + normal(count, seed + 1, moved)).to(dtype)
    scales, codes = code.rounded(new.float(), 0)
    found = coarse.decode(coarse.encode(scales, codes, code, old), code, old, count)
    assert (found[0] == scales).all()
    assert (found[1] == codes).all()


@pytest.mark.parametrize("bits", [8, 7, 4])
def test_it_takes_the_entropy_of_the_levels_or_of_their_moves(bits: int) -> None:
    code, count = Blocks(bits), 200_000
    new = normal(count, 0).bfloat16()
    scales, codes = code.rounded(new.float(), 0)
    levels = code.values(scales, codes, (count,))
    counts = torch.from_numpy(codes).unique(return_counts=True)[1]
    entropy = float(-(counts * (counts / count).log2()).sum()) / 8
    whole = len(coarse.encode(scales, codes, code, None))
    assert entropy < whole < 1.02 * entropy + 2 * count / 128
    received = levels.bfloat16()
    for old in (new, received):  # what is known exactly, or as it was received
        assert len(coarse.encode(scales, codes, code, old)) < count / 200
    moved = (new.float() + normal(count, 1, 1e-4)).bfloat16()
    few = coarse.encode(*code.rounded(moved.float(), 0), code, received)
    assert len(few) < whole / 8


@pytest.mark.parametrize("bits", [8, 7, 6, 5])  # of fewer bits they come of the codes themselves
def test_scales_alone_are_those_of_the_codes(bits: int) -> None:
    x = normal(1000, 0)
    x[:200] = 0
    assert (Blocks(bits).scales(x) == Blocks(bits).rounded(x, 0)[0]).all()


@pytest.mark.parametrize("damage", ["empty", "head", "shift", "cut", "longer", "levels"])
@pytest.mark.parametrize("moved", [None, 1e-2])
def test_damage_is_seen(damage: str, moved: float | None) -> None:
    code, count = Blocks(8), 1000
    new = normal(count, 0)
    old = None if moved is None else new + normal(count, 1, moved)
    data = coarse.encode(*code.rounded(new, 0), code, old)
    hurt = {
        "empty": b"",
        "head": data[:5],
        "shift": b"\x07" + data[1:],
        "cut": data[:-1],
        "longer": data + b"\0",
        "levels": data[:1] + b"\xff\xff" + data[3:],
    }[damage]
    with pytest.raises(ValueError, match=r"coarse|symbols|integers|packed"):
        coarse.decode(hurt, code, old, count)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(1, 255), st.sampled_from(CODES))
def test_no_byte_that_is_changed_breaks_more_than_the_code(place: int, change: int, code: Blocks) -> None:
    """What decodes in spite of it is some other code of as many weights, or one that the code itself refuses."""
    count = 300
    old = normal(count, 1)
    data = bytearray(coarse.encode(*code.rounded(normal(count, 0), 0), code, old))
    data[place % len(data)] ^= change
    try:
        scales, codes = coarse.decode(bytes(data), code, old, count)
    except ValueError:
        return
    assert (scales.size, codes.size) == (math.ceil(count / code.block), count)
