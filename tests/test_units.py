"""Numbers for people."""

from __future__ import annotations

import math

import pytest

from thinwire.units import bars


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([0.7, 0.0], "█▁"),
        ([2.0, 1.0, 3.0], "▅▁█"),
        ([1.0, math.nan, 2.0, math.inf], "▁ █ "),
        ([1.0, 1.0], "▁▁"),
        ([], ""),
        ([math.nan], " "),
    ],
)
def test_a_curve_is_a_block_a_value(values: list[float], drawn: str) -> None:
    assert bars(values) == drawn
