"""Projections on directions, and what the directions give back, against whole ones in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from thinwire.perturb import projection
from thinwire.perturb.directions import Directions
from thinwire.perturb.projection import project

SEEDS = [3, 40, 41, 42, 900, 5, 3]  # of three words, and one that comes again


@pytest.mark.parametrize("shape", [(1,), (7,), (33, 5), (4, 3, 6), (2, 1300)])
@pytest.mark.parametrize("law", ["sign", "gaussian", "lowrank"])
def test_it_is_the_product_with_whole_directions(
    law: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "TILE", 1024)  # the largest tensor does not end where a tile does
    directions, x = Directions(7, law, 2), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dense = np.array([float((directions.direction("w", shape, s).double() * x.double()).sum()) for s in SEEDS])
    # a direction is as long as the root of its elements: half a float32 step of the longest that a product can be
    near = 2**-24 * float(x.norm()) * x.numel() ** 0.5
    assert project(directions, x, "w", SEEDS) == pytest.approx(dense, abs=near)
    other = project(directions, x, "v", SEEDS)
    assert not np.allclose(other, dense)  # each tensor has directions of its own
    if len(shape) == 2:  # the elements are counted in rows, however they lie
        assert project(directions, x.T.contiguous().T, "w", SEEDS) == pytest.approx(dense, abs=near)
    assert project(directions, x, "w", []).shape == (0,)


@pytest.mark.parametrize("scale", [1e-7, 1e-30])
def test_an_update_of_a_tiny_scale_is_not_lost(scale: float) -> None:
    """In half precision its products would all be 0."""
    x = scale * torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    for law in ("sign", "gaussian", "lowrank"):
        found = project(Directions(3, law), x, "w", range(64))
        assert np.sqrt(np.square(found).mean()) == pytest.approx(float(x.double().norm()), rel=0.4)


@pytest.mark.parametrize("law", ["sign", "gaussian", "lowrank"])
def test_the_mean_of_reconstructions_is_the_update(law: Any) -> None:
    """sum_k (z_k . x) z_k / K over ever more directions, whose error is |x| sqrt(d / K)."""
    count, directions = 2048, Directions(11, law)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    coordinates = project(directions, x, "w", range(count))
    made = directions.apply(torch.zeros(5, 6, dtype=torch.float64), "w", range(count), coordinates / count)
    few = directions.apply(torch.zeros(5, 6, dtype=torch.float64), "w", range(32), coordinates[:32] / 32)
    expected = float(x.norm()) * (30 / count) ** 0.5
    assert 0.5 * expected < float((made - x).norm()) < 2 * expected
    assert float((few - x).norm()) > 3 * float((made - x).norm())
