"""What is legal in weights that come from elsewhere, and that looking at them costs no copy."""

from __future__ import annotations

import math

import pytest
import torch

from thinwire import memory
from thinwire.train.weights import PART, check_weights
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST


@pytest.mark.parametrize(
    ("at", "value", "line"),
    [
        (0, math.nan, "w is not finite"),
        (PART + 5, math.inf, "w is not finite"),
        (2 * PART, 1.0 + 1.01 * LARGEST, f"w is beyond {LARGEST:g}"),
        (2 * PART, -1.01 * LARGEST, f"w is beyond {LARGEST:g}"),
        (PART, 1.0 + LARGEST, None),
    ],
)
def test_a_number_is_found_wherever_it_stands(at: int, value: float, line: str | None) -> None:
    known, sent = torch.ones(3, PART), torch.ones(3, PART)
    sent.view(-1)[at] = value
    if line is None:
        check_weights({"w": known}, {"w": sent})
        return
    with pytest.raises(Illegal, match=line):
        check_weights({"w": known}, {"w": sent})


def test_names_shapes_and_dtypes_are_the_models() -> None:
    known = {"w": torch.ones(2, 3)}
    for sent, line in (
        ({"v": torch.ones(2, 3)}, "names"),
        ({"w": torch.ones(3, 2)}, r"w is torch.float32 \[3, 2\], not torch.float32 \[2, 3\]"),
        ({"w": torch.ones(2, 3, dtype=torch.float16)}, r"w is torch.float16 \[2, 3\], not torch.float32 \[2, 3\]"),
    ):
        with pytest.raises(Illegal, match=line):
            check_weights(known, sent)
    check_weights({"w": torch.ones(0)}, {"w": torch.ones(0)})


def test_a_check_makes_no_copy_of_a_tensor() -> None:
    known, sent = {"w": torch.zeros(1 << 24)}, {"w": torch.ones(1 << 24)}
    check_weights({"w": torch.zeros(PART)}, {"w": torch.ones(PART)})
    memory.trim()
    before = memory.resident()
    memory.reset()
    check_weights(known, sent)
    assert memory.peak() - before < (1 << 26) / 8
