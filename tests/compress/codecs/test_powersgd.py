"""Low-rank codes of a matrix, held to their equations."""

from __future__ import annotations

import pytest
import torch

from thinwire.compress.codecs.powersgd import PowerSgd


def matrix(rows: int = 48, columns: int = 32, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, columns, generator=draw)
    return torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / x.norm())


def test_powersgd_is_exact_on_its_rank_after_two_steps() -> None:
    """Exact but for the 8 bits in which the halves travel, a percent."""
    x = matrix(rank=3)
    code = PowerSgd(3, steps=2)
    assert error(x, code.decode(code.encode(x, 7), x.shape, 7)) < 0.015
    p, _ = torch.linalg.qr(x @ code.start((48, 32), 7))
    p, _ = torch.linalg.qr(x @ (x.T @ p))
    assert error(x, p @ (x.T @ p).T) < 1e-5  # the iteration itself


def test_svd_is_the_best_of_its_rank() -> None:
    x = matrix()
    values = torch.linalg.svdvals(x)
    best = float((values[4:].square().sum() / values.square().sum()).sqrt())
    svd = PowerSgd(4, steps=0)
    assert error(x, svd.decode(svd.encode(x, 0), x.shape, 0)) == pytest.approx(best, rel=0.01)
    one = PowerSgd(4, steps=1)
    assert error(x, one.decode(one.encode(x, 0), x.shape, 0)) > best


def test_a_warm_start_nears_the_svd() -> None:
    x = matrix() + 3 * matrix(rank=4, seed=5)
    svd, code, start = PowerSgd(4, steps=0), PowerSgd(4), None
    errors = []
    for _ in range(6):
        data = code.encode(x, 1, start)
        _, start = code.halves(data, (48, 32))
        errors.append(error(x, code.decode(data, x.shape, 1)))
    best = error(x, svd.decode(svd.encode(x, 0), x.shape, 0))
    assert errors[-1] < errors[0]
    assert errors[-1] == pytest.approx(best, rel=0.02)


def test_error_feedback_sends_everything_in_the_end() -> None:
    """What was sent and what is kept add up to what came in, and what is kept stays bounded."""
    code, x, kept = PowerSgd(2), matrix(), torch.zeros(48, 32)
    sent = torch.zeros(48, 32)
    for round in range(30):
        wanted = x + kept
        decoded = code.decode(code.encode(wanted, round), x.shape, round)
        sent, kept = sent + decoded, wanted - decoded
    torch.testing.assert_close(sent + kept, 30 * x, rtol=1e-4, atol=1e-3)
    assert error(30 * x, sent) < 0.4


def test_bytes_are_as_promised() -> None:
    code = PowerSgd.within(600, (48, 32))
    data = code.encode(matrix(), 0)
    assert len(data) == code.size((48, 32)) <= 600 < PowerSgd(code.rank + 1).size((48, 32))
    with pytest.raises(ValueError, match="hold no direction"):
        PowerSgd.within(50, (48, 32))
    with pytest.raises(ValueError, match="expected"):
        code.decode(data[:-1], (48, 32), 0)
