"""Who counts how much: bounded and fair shares against slow plain definitions, and what a round makes of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, tiny_net
from pydantic import ValidationError
from torch import Tensor

from thinwire import wire
from thinwire.aggregate.weights import Agreement, Weighing, bounded, leaning
from thinwire.core import Averaged, Method
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.model.net import Net
from thinwire.wire import Frame
from thinwire.wire.legal import MOST

RNG = np.random.default_rng(0)


def slow_bounded(shares: Any, floor: float, cap: float) -> Any:
    """t by halving."""
    low, high = 0.0, 1 / shares.min() + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * shares, floor, cap).sum() < 1 else (low, middle)
    return np.clip(high * shares, floor, cap)


def best_vertex(shares: Any, losses: Any, distance: float, floor: float, cap: float) -> float:
    """The largest sum of share times loss over all vertices of the polytope: all but one entry at a bound."""
    low, high = np.maximum(shares - distance, floor), np.minimum(shares + distance, cap)
    found = -math.inf
    for free in range(shares.size):
        others = [i for i in range(shares.size) if i != free]
        for ends in itertools.product((0, 1), repeat=len(others)):
            point = np.zeros_like(shares)
            point[others] = [(low, high)[end][i] for end, i in zip(ends, others, strict=True)]
            point[free] = 1 - point.sum()
            if low[free] - 1e-12 <= point[free] <= high[free] + 1e-12:
                found = max(found, float(point @ losses))
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_bounded_shares_are_the_scaled_ones_that_sum_to_1(n: int) -> None:
    for _ in range(20):
        shares = RNG.dirichlet(np.full(n, 0.3)) + 1e-6
        shares /= shares.sum()
        floor, cap = RNG.uniform(0, 1 / n), RNG.uniform(1 / n, 1)
        found = bounded(shares, floor, cap)
        assert found.sum() == pytest.approx(1, abs=1e-9)
        assert found.min() >= floor
        assert found.max() <= cap
        np.testing.assert_allclose(found, slow_bounded(shares, floor, cap), atol=1e-9)
    np.testing.assert_allclose(bounded(np.array([0.7, 0.2, 0.1]), 0, 0.5), [0.5, 1 / 3, 1 / 6])
    np.testing.assert_array_equal(bounded(np.full(4, 0.25), 0, 1), np.full(4, 0.25))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_fair_shares_are_the_best_vertex(n: int) -> None:
    for _ in range(20):
        shares, losses = RNG.dirichlet(np.ones(n)), RNG.uniform(0, 5, n)
        distance = float(RNG.choice([0, 0.05, 0.2, 1]))
        floor, cap = min(0.02, shares.min()), max(0.9, shares.max())
        found = leaning(shares, losses, distance, floor, cap)
        assert found.sum() == pytest.approx(1, abs=1e-12)
        assert (np.abs(found - shares) <= distance + 1e-12).all()
        assert found @ losses == pytest.approx(best_vertex(shares, losses, distance, floor, cap), abs=1e-9)


def test_fair_shares_between_the_plain_mean_and_the_worst_client_alone() -> None:
    shares, losses = np.array([0.5, 0.3, 0.2]), np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(leaning(shares, losses, 0), shares)
    np.testing.assert_allclose(leaning(shares, losses, 1), [0, 0, 1])
    np.testing.assert_allclose(leaning(shares, losses, 0.1), [0.4, 0.3, 0.3])
    unknown = leaning(shares, np.array([1.0, math.nan, 3.0]), 0.1)
    np.testing.assert_allclose(unknown, [0.4, 0.3, 0.3])
    np.testing.assert_allclose(leaning(np.full(4, 0.25), np.ones(4), 0.1), np.full(4, 0.25))  # alike: nobody leans


@dataclass(frozen=True)
class Up:
    """A reply of so many examples."""

    examples: int
    loss: float = 1.0


def weigh(agreement: Agreement | None, ups: list[Up], **late: Any) -> tuple[list[float], Weighing]:
    weighing = Weighing(agreement, ["north", "south", "east", "west"], **late)
    found = [weight for _, _, weight in weighing(enumerate(ups), lambda up: up.examples)]
    assert sum(share.share for share in weighing.shares.values()) == pytest.approx(1)
    return found, weighing


def shares(weighing: Weighing) -> list[float]:
    return [round(share.share, 6) for share in weighing.shares.values()]


def reasons(weighing: Weighing) -> list[str]:
    return [share.why for share in weighing.shares.values()]


def test_who_counts_how_much_and_why() -> None:
    ups = [Up(60), Up(30), Up(10, 3.0)]
    plain, weighing = weigh(None, ups)
    assert plain == [60, 30, 10]
    assert all(type(weight) is int for weight in plain)  # to the bit what it was without an agreement
    assert (shares(weighing), reasons(weighing)) == ([0.6, 0.3, 0.1], ["by examples"] * 3)
    _, weighing = weigh(Agreement(by="equal"), ups)
    assert (shares(weighing)[0], reasons(weighing)[0]) == (0.333333, "equally")
    table = {"north": 0.1, "south": 0.2, "east": 0.2, "west": 0.5}
    _, weighing = weigh(Agreement(by="table", table=table), ups)  # west is absent
    assert (shares(weighing), reasons(weighing)[0]) == ([0.2, 0.4, 0.4], "by table")
    _, weighing = weigh(Agreement(by="examples", cap=0.4), ups)
    assert shares(weighing) == [0.4, 0.4, 0.2]
    assert reasons(weighing) == [
        "by examples, capped from 0.6",
        "by examples, capped from 0.3",
        "by examples, moved as others were bounded from 0.1",
    ]
    _, weighing = weigh(Agreement(floor=0.2, fair=0.1), ups)
    assert shares(weighing) == [0.469697, 0.230303, 0.3]
    assert reasons(weighing)[2] == "by examples, raised to the floor from 0.1, leant from 0.2 by a loss of 3"
    _, weighing = weigh(Agreement(by="examples", stale=0.5), ups, late={0: 2})
    assert (shares(weighing)[0], reasons(weighing)[0]) == (round(15 / 55, 6), "by examples, late by 2")


def test_fewer_replies_than_a_cap_was_made_for_count_alike() -> None:
    _, weighing = weigh(Agreement(by="examples", cap=0.3), [Up(60), Up(20)])
    assert shares(weighing) == [0.5, 0.5]
    _, weighing = weigh(Agreement(by="examples", cap=0.3), [Up(60)])
    assert shares(weighing) == [1.0]


def test_who_counts_nothing_is_not_averaged() -> None:
    found, weighing = weigh(Agreement(fair=1.0), [Up(60, 1.0), Up(30, 2.0)])
    assert (found, shares(weighing)) == ([1.0], [0.0, 1.0])


def test_who_is_left_out_leaves_its_share_to_the_others() -> None:
    _, weighing = weigh(Agreement(by="examples"), [Up(60), Up(30), Up(10)])
    weighing.leave_out([0, 3])
    assert (shares(weighing), reasons(weighing)) == ([0.0, 0.75, 0.25], ["by examples"] * 3)
    weighing.leave_out([1, 2])
    assert shares(weighing) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"by": "table", "table": {"a": 0.5, "b": 0.4}}, "its shares sum to 0.9, not to 1"),
        ({"by": "table"}, 'by = "table" and a table go together'),
        ({"table": {"a": 1.0}}, 'by = "table" and a table go together'),
        ({"floor": 0.3, "cap": 0.2}, "a floor of 0.3 is above the cap of 0.2"),
        ({"by": "table", "table": {"a": 1.0, "b": 0.0}}, "greater than 0"),
    ],
)
def test_an_agreement_that_is_none_is_refused(fields: Any, line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        Agreement(**fields)


# In a round

LOCAL: dict[str, Any] = {"steps": 2, "batch_size": 4, "lr": 1e-2}
METHODS: dict[str, Averaged] = {
    "fedavg": FedAvg(**LOCAL),
    "gradualdiff": GradualDiff(**LOCAL),
    "fedkseed": FedKSeed(seeds=32, steps=4, batch_size=4, lr=1e-3),
}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def state_of(method: Method, net: Net, folder: Path, agreement: Agreement | None, **more: Any) -> Any:
    federation = Federation(method, net, folder, rounds=2, agreement=agreement, **more).run()
    return bytes(wire.encode(federation.state)), federation


@pytest.mark.parametrize("name", list(METHODS))
def test_every_averaged_method_keeps_to_the_agreement(name: str, net: Net, tmp_path: Path) -> None:
    method = METHODS[name]
    plain, federation = state_of(method, net, tmp_path / "plain", None)
    found = federation.history[0].server.weighing.shares.values()
    assert [round(share.share, 4) for share in found] == [0.3333, 0.2222, 0.4444]
    uniform, _ = state_of(method.model_copy(update={"weighting": "uniform"}), net, tmp_path / "uniform", None)
    assert state_of(method, net, tmp_path / "examples", Agreement(by="examples"))[0] == plain
    assert state_of(method, net, tmp_path / "equal", Agreement(by="equal"))[0] == uniform != plain
    assert state_of(method, net, tmp_path / "cap", Agreement(cap=0.4))[0] not in (plain, uniform)


def weights_of(frame: Frame) -> dict[str, Tensor]:
    return {n: t.double() for n, t in wire.decode(FedAvg.Up, frame).weights.items()}


@pytest.mark.parametrize("spooled", [False, True])
def test_a_claim_of_rows_moves_the_model_no_further_than_its_capped_share(
    spooled: bool, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1 claims the most rows that a frame may, and its weights are a thousandfold off."""
    spool = tmp_path / "spool"
    spool.mkdir()
    if spooled:
        monkeypatch.setattr(wire.frame, "SPOOL_ABOVE", 1 << 10)
    sent: dict[int, dict[str, Tensor]] = {}

    def forge(client: int, frame: Frame) -> Frame:
        up = wire.decode(FedAvg.Up, frame)
        if client == 1:
            up = replace(up, weights={n: 1e3 * t for n, t in up.weights.items()}, examples=MOST)
            frame.remove()
            frame = wire.encode(up, run=1, round=1, client=1, spool=spool)
        sent[client] = weights_of(frame)
        return frame

    federation = Federation(METHODS["fedavg"], net, tmp_path, tamper=forge, agreement=Agreement(cap=0.4), spool=spool)
    federation.step()
    found = federation.history[0].server.weighing.shares
    assert found[1].share == 0.4
    for name, tensor in federation.state.weights.items():
        want = sum(found[client].share * sent[client][name] for client in sent)
        torch.testing.assert_close(tensor.double(), want, rtol=1e-5, atol=1e-6)
    assert not list(spool.iterdir())


def test_a_claim_beyond_all_bounds_is_dropped(net: Net, tmp_path: Path) -> None:
    def forge(client: int, frame: Frame) -> Frame:
        up = replace(wire.decode(FedAvg.Up, frame), examples=1 << 62)
        return frame if client != 1 else wire.encode(up, run=1, round=1, client=1)

    federation = Federation(METHODS["fedavg"], net, tmp_path, tamper=forge, agreement=Agreement(cap=0.6))
    at = federation.step()
    assert "examples is 4611686018427387904" in str(at.visits[1].error)
    assert {client: round(s.share, 6) for client, s in at.server.weighing.shares.items()} == {0: 0.428571, 2: 0.571429}


def test_shares_lean_to_the_client_that_is_served_worst(net: Net, tmp_path: Path) -> None:
    at = Federation(METHODS["fedavg"], net, tmp_path, agreement=Agreement(by="equal", fair=0.2)).step()
    losses = {client: visit.loss for client, visit in at.visits.items()}
    order = sorted(losses, key=lambda client: losses[client] or 0.0)
    assert [round(at.server.weighing.shares[client].share, 6) for client in order] == [0.133333, 0.333333, 0.533333]
