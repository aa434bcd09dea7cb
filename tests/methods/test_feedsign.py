"""FeedSign against its equations, written slowly: a bit a step, one vote each, nothing lost to who comes late."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.core import StaleVersion
from thinwire.costs.frames import Expected
from thinwire.methods.feedsign import Ballot, FeedSign, Run, packed, unpacked
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.perturb.probe import Probe
from thinwire.train.objective import loss

SMALL: dict[str, Any] = {"lr": 2e-3, "eps": 1e-3, "batch_size": 4}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def weights(net: Net) -> Tensor:
    return torch.cat([p.detach().double().flatten() for _, p in net.parameters()])


def fill(net: Net, flat: Tensor) -> None:
    offset = 0
    with torch.no_grad():
        for _, parameter in net.parameters():
            parameter.copy_(flat[offset : offset + parameter.numel()].view(parameter.shape))
            offset += parameter.numel()


@pytest.mark.parametrize("steps", [1, 2])
def test_rounds_are_the_equations(steps: int, net: Net, tmp_path: Path) -> None:
    """With whole directions and float64 weights; the pool of three comes round."""
    method, sizes = FeedSign(**SMALL, seeds=3, steps=steps), (8, 6, 12)
    federation = Federation(method, net, tmp_path, sizes=sizes, rounds=4, seed=2)
    directions = Directions(federation.state.pool, "sign")
    z = [
        torch.cat([directions.direction(n, p.shape, k).double().flatten() for n, p in net.parameters()])
        for k in range(3)
    ]
    net.reset()
    w = start = weights(net)
    votes: list[int] = []
    for round in (1, 2, 3, 4):
        total = np.zeros(steps)
        for id in range(3):
            client, here = federation.client(id, round), w
            batches = client.data.batches(client.key.fold("batches"), 4)
            for step in range(steps):
                batch, j, found = next(batches), (len(votes) + step) % 3, []
                for eps in (1e-3, -1e-3):
                    fill(net, here + eps * z[j])
                    with torch.no_grad():
                        found.append(float(loss(net.model, batch)))
                sign = np.sign(found[0] - found[1])
                total[step] += sign
                here = here - 2e-3 * sign * z[j]  # in a visit, a client's own bits lead
        for vote in np.sign(total):
            w = w - 2e-3 * vote * z[len(votes) % 3]
            votes.append(int(vote))
        net.forget()
        federation.step()
        assert federation.state.votes.tolist() == votes
    method.materialise(federation.state, net)
    assert (weights(net) - w).norm() < 1e-5 * (w - start).norm()
    assert len({*votes}) > 1  # else it would be no test of the sides


def reply(*signs: int, examples: int = 8) -> Ballot:
    return Ballot(*packed(np.array(signs, np.int8)), examples, 0.5)


def votes_of(net: Net, folder: Path, *replies: Ballot) -> list[int]:
    method = FeedSign(steps=len(unwrapped(replies[0])))
    federation = Federation(method, net, folder)
    for up in replies:
        method.check(federation.state, 0, up)
    state, _ = method.aggregate(federation.state, federation.server(1, (0, 1, 2)), iter(enumerate(replies)))
    return state.votes.tolist()


def unwrapped(up: Ballot) -> list[int]:
    return unpacked(up.bits, up.silent, 3).tolist()


def test_the_vote_is_the_majoritys_and_a_tie_moves_nothing(net: Net, tmp_path: Path) -> None:
    assert votes_of(net, tmp_path, reply(1, 1, -1), reply(1, -1, -1), reply(-1, -1, -1)) == [1, -1, -1]
    assert votes_of(net, tmp_path, reply(1, 1, -1), reply(-1, 1, 1)) == [0, 1, 0]
    assert votes_of(net, tmp_path, reply(0, 0, 1), reply(0, -1, -1)) == [0, -1, 0]
    assert votes_of(net, tmp_path, reply(-1, 0, 1)) == [-1, 0, 1]


def test_one_hostile_client_moves_a_step_by_no_more_than_one_step(net: Net, tmp_path: Path) -> None:
    """Whatever it answers, and however many rows it claims to have, against all that two others may answer."""
    for honest in itertools.product((1, -1), repeat=2):
        others = [reply(sign, 1, 1) for sign in honest]
        without = votes_of(net, tmp_path, *others)[0]
        for lie in (1, 0, -1):
            vote = votes_of(net, tmp_path, *others, reply(lie, 1, 1, examples=10**6))[0]
            assert abs(vote - without) <= 1
            if honest[0] == honest[1]:
                assert vote == without  # two who agree are not outvoted


def test_one_bit_travels_as_one_bit(net: Net, tmp_path: Path) -> None:
    """Of replies, and of the votes to who was there in the round before: eight steps cost one byte, and no more."""
    sizes = {}
    for steps in (1, 8, 9, 64):
        federation = Federation(FeedSign(**SMALL, steps=steps), net, tmp_path / str(steps), rounds=3)
        votes = torch.ones(steps, dtype=torch.int8)
        held = federation.versions.put({"votes": votes[:1]})
        state = Run(federation.state.pool, torch.cat([votes[:1], votes]))
        down = federation.method.broadcast(state, federation.server(3, (0,)), 0, held)
        up = reply(*[1] * steps)
        sizes[steps] = [len(wire.encode(payload, run=2**31, round=3, client=0)) for payload in (down, up)]
    assert [sizes[8][i] - sizes[1][i] for i in (0, 1)] == [0, 0]
    assert [sizes[9][i] - sizes[8][i] for i in (0, 1)] == [1, 1]
    assert [sizes[64][i] - sizes[8][i] for i in (0, 1)] == [7, 7]


def test_the_estimate_is_of_the_bytes_without_and_with_signs_that_are_none(net: Net, tmp_path: Path) -> None:
    """Client 1 misses a round, and then receives the votes of both."""
    method, cohorts, met = FeedSign(**SMALL, steps=5), [(0, 1, 2), (0,), (0, 1, 2)], set()
    federation = Federation(method, net, tmp_path, rounds=3)
    frames = method.frames(Expected({}, 1, federation.sizes, cohorts, federation.server))  # type: ignore[arg-type]
    assert frames is not None
    for round, cohort in enumerate(cohorts, 1):
        at = federation.step(cohort)
        for id in cohort:
            down, up = frames(round, id, round == 1)
            assert at.visits[id].bytes_down in (down.least, down.most)
            assert at.visits[id].bytes_up in (up.least, up.most)
            assert down.exact == (round == 1)
            met.add(at.visits[id].bytes_up == up.least)
    assert True in met


def test_whoever_comes_holds_the_same_bits(net: Net, tmp_path: Path) -> None:
    method = FeedSign(**SMALL, steps=3, seeds=7)
    federation = Federation(method, net, tmp_path, sizes=(8,) * 4, rounds=9)
    for cohort in ((0, 1), (0, 1), (0, 2)):
        federation.step(cohort)
    downs = federation.sent_next(0, 1, 3)
    assert [down.count for down in downs] == [3, 6, 9]
    with pytest.raises(StaleVersion):
        method.receive(dataclasses.replace(downs[-1], base="0" * 32), federation.client(3, 4))


def test_a_step_without_a_sign_is_silent_and_counted(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = iter([(math.nan, 1.0), (2.0, 2.0), (2.0, 1.0), (1.0, 2.0)])
    monkeypatch.setattr(Probe, "losses", lambda *_: [next(pairs)])
    federation = Federation(FeedSign(**SMALL, steps=4), net, tmp_path, sizes=(8,), rounds=1)
    federation.step()
    assert federation.state.votes.tolist() == [0, 0, 1, -1]
    assert federation.metrics["skipped"] == 2
    assert federation.metrics["loss"] == pytest.approx(5 / 3)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 500])
def test_signs_come_back_from_their_bits(count: int) -> None:
    signs = np.random.default_rng(count).integers(-1, 2, count).astype(np.int8)
    for these in (signs, np.where(signs == 0, 1, signs).astype(np.int8)):
        bits, none = packed(these)
        assert (none is None) == (these != 0).all()
        assert unpacked(bits, none, count).tolist() == these.tolist()
        assert bits.numel() == math.ceil(count / 8)


BITS = torch.tensor([0b10100000], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "silent"),
    [
        (torch.zeros(2, dtype=torch.uint8), None),
        (torch.zeros(1, dtype=torch.int8), None),
        (torch.zeros(0, dtype=torch.uint8), None),
        (BITS | 16, None),  # a fourth step
        (BITS, BITS),  # up and silent
        (BITS, torch.zeros(1, dtype=torch.uint8)),  # none is, so it need not be sent
        (BITS, torch.zeros(2, dtype=torch.uint8)),
        (BITS, torch.full((1,), 8, dtype=torch.uint8)),
    ],
)
def test_what_a_client_may_not_answer(bits: Tensor, silent: Tensor | None) -> None:
    method, state = FeedSign(steps=3), Run(1, torch.zeros(0, dtype=torch.int8))
    method.check(state, 0, Ballot(BITS, None, 8, 0.5))
    with pytest.raises(wire.Illegal, match="sign"):
        method.check(state, 0, Ballot(bits, silent, 8, 0.5))


def test_a_broadcast_that_is_none_is_refused(net: Net, tmp_path: Path) -> None:
    federation = Federation(FeedSign(**SMALL), net, tmp_path).run(2)
    method = federation.method
    down = method.broadcast(federation.state, federation.server(3, (0,)), 0, None)
    for change in ({"count": -1}, {"count": 1 << 60}, {"count": 9}, {"pool": -1}, {"bits": down.bits.float()}):
        with pytest.raises(wire.Illegal):
            method.receive(dataclasses.replace(down, **change), federation.client(0, 3))
    for field in ({"steps": 0}, {"seeds": 0}, {"lr": 0}, {"weighting": "examples"}):
        with pytest.raises(ValueError, match=next(iter(field))):
            FeedSign(**field)
