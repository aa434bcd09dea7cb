"""What a reply may report beside its update, and what a broadcast may ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from thinwire.wire import Illegal
from thinwire.wire.legal import check_keys, check_rate, check_report


@dataclass(frozen=True)
class Report:
    examples: int = 8
    loss: float = 0.5
    skipped: int = 0


@pytest.mark.parametrize("report", [Report(), Report(loss=math.nan), Report(1, -2.0, 3), Report(100), object()])
def test_an_honest_report_passes(report: object) -> None:
    check_report(report, 100)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (Report(examples=0), "examples is 0"),
        (Report(examples=-5), "examples is -5"),
        (Report(examples=101), "examples is 101, of 100 at most"),
        (Report(examples=2**64 - 1), "of 100 at most"),
        (Report(loss=1e308), "a loss of 1e"),
        (Report(loss=-math.inf), "a loss of -inf"),
        (Report(skipped=-(2**63)), "skipped is -"),
        (Report(skipped=2**63), "skipped is"),
    ],
)
def test_a_lie_is_refused(report: Report, reason: str) -> None:
    with pytest.raises(Illegal, match=reason):
        check_report(report, 100)


@pytest.mark.parametrize("lr", [-1e-9, 1e300, math.inf, math.nan])
def test_a_rate_that_no_run_file_has(lr: float) -> None:
    check_rate(0.0)
    with pytest.raises(Illegal, match="a rate of"):
        check_rate(lr)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_a_key_beyond_its_range(key: int) -> None:
    check_keys(0, 2**64 - 1)
    with pytest.raises(Illegal, match="key"):
        check_keys(5, key)
