"""Products in bfloat16: what is trained, and travels, is as it was; only its rounding is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federation import Federation
from rows import ROWS

from thinwire.core import Method
from thinwire.model import autocast
from thinwire.model.net import Net

pytestmark = pytest.mark.skipif(
    not autocast.has_products(torch.device("cpu")), reason="this processor has no products of bfloat16 numbers"
)
SOME = ["fedavg", "fedavg-core", "fedcybgd", "fedkseed", "ferret", "onebit", "scaffold"]  # each computes in its own way


@pytest.fixture(params=SOME)
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def rounded(net: Net) -> Iterator[None]:
    autocast.round_products(net.model, True)
    yield
    autocast.round_products(net.model, False)


def test_a_method_learns_with_rounded_products(row: str, method: Method, net: Net, tmp_path: Path) -> None:
    assert Federation(method, net, tmp_path, rounds=10).fall() > ROWS[row].fall / 2
    assert {p.dtype for p in net.model.parameters()} == {torch.float32}
