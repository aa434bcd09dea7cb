"""Ferret against its equations, written slowly: whole directions, whole weights, float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.compress.entropy import integers
from thinwire.keys import Key
from thinwire.methods import ferret
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.ferret import Coordinates, Descent, Ferret
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.perturb.pool import draws_key
from thinwire.train.local import Local

SMALL: dict[str, Any] = {"lr": 1e-2, "steps": 2, "batch_size": 4, "seeds": 5, "coordinates": 60}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def weights(net: Net) -> list[Tensor]:
    return [p.detach().double().clone() for _, p in net.parameters()]


@pytest.mark.parametrize("law", ["sign", "lowrank"])
def test_rounds_are_the_equations(law: Any, net: Net, tmp_path: Path) -> None:
    """Of the mean of the clients' updates, along directions that are never cut into tiles nor rounded."""
    method = Ferret(**SMALL, law=law, schedule="linear", server_step={"kind": "plain", "lr": 0.5})
    federation = Federation(method, net, tmp_path, sizes=(8, 16), rounds=3)
    net.reset()
    start, first = weights(net), federation.state
    directions = Directions(first.pool, law)
    z = [
        torch.stack([directions.direction(name, p.shape, k).double() for k in range(5)]) for name, p in net.parameters()
    ]
    sums = torch.zeros(len(z), 5, dtype=torch.float64)
    for round in (1, 2):
        held = torch.round(sums / (federation.state.grid or 1)) * federation.state.grid
        here = [w - torch.tensordot(row, each, 1) for w, row, each in zip(start, held, z, strict=True)]
        method.materialise(federation.state, net)
        for mine, other in zip(weights(net), here, strict=True):
            assert (mine - other).norm() <= 1e-6 * other.norm()
        mean = [torch.zeros_like(w) for w in start]
        for id, rows in ((0, 8), (1, 16)):
            with torch.no_grad():
                for (_, parameter), w in zip(net.parameters(), here, strict=True):
                    parameter.copy_(w)
            before = weights(net)
            method.train(federation.client(id, round), 1e-2 * (1 - (round - 1) / 3))
            for total, old, new in zip(mean, before, weights(net), strict=True):
                total += rows / 24 * (old - new)
        net.forget()
        counts = method._counts(federation.state)
        tensors, seeds = method._drawn(first.pool, draws_key(federation.server(round, (0, 1)).key), counts)
        for i, k in zip(tensors.tolist(), seeds.tolist(), strict=True):
            sums[i, k] += 0.5 * (z[i][k] * mean[i]).sum() / int(counts[i])
        federation.step()
        assert (federation.state.gains.view(-1, 5) - sums).norm() < 2e-3 * sums.norm()
    assert sums.count_nonzero() > 60


def test_the_coordinates_tell_how_long_each_tensors_update_is(net: Net, tmp_path: Path) -> None:
    method = Ferret(lr=1e-2, steps=2, batch_size=4, coordinates=4000)
    federation = Federation(method, net, tmp_path, sizes=(8,), rounds=1)
    net.reset()
    before = weights(net)
    method.train(federation.client(0, 1), 1e-2)
    true = np.array([float((old - new).square().sum()) for old, new in zip(before, weights(net), strict=True)])
    net.forget()
    federation.step()
    found = federation.state.squares.numpy()
    large = true > true.max() / 100
    assert found[large] == pytest.approx(true[large], rel=0.6)  # 200 directions each: six standard deviations
    assert found.sum() == pytest.approx(true.sum(), rel=0.4)


def test_a_tiny_rate_still_has_coordinates(net: Net, tmp_path: Path) -> None:
    method = Ferret(**(SMALL | {"lr": 1e-5}))
    federation = Federation(method, net, tmp_path, rounds=1)
    up = method.client_update(method.broadcast(federation.state, federation.server(1, (0,)), 0, None),
                              federation.client(0, 1))  # fmt: skip
    assert 0 < up.unit < 1e-4
    assert up.coordinates.count_nonzero() > 0.8 * up.coordinates.numel()
    assert up.coordinates.abs().max() == 1


def test_whoever_comes_holds_the_same_bits(net: Net, tmp_path: Path) -> None:
    """Who was there in the last round, who missed one, who is new: for the first two the changes are enough."""
    method = Ferret(**(SMALL | {"seeds": 64, "steps": 1}))
    federation = Federation(method, net, tmp_path, sizes=(8, 8, 8, 8), rounds=9)
    for cohort in ((0, 1), (0, 1), (0, 2)):
        federation.step(cohort)
    there, missed, new = (len(down.levels) for down in federation.sent_next(0, 1, 3))
    assert there < missed < new


def test_all_clients_of_a_round_use_the_same_directions_and_the_next_round_others(net: Net, tmp_path: Path) -> None:
    method = Ferret(**(SMALL | {"seeds": 50}))
    federation = Federation(method, net, tmp_path)
    downs = [method.broadcast(federation.state, federation.server(1, (0, 1)), id, None) for id in (0, 1)]
    assert downs[0] == downs[1]
    counts = method._counts(federation.state)
    drawn = [method._drawn(1, draws_key(federation.server(round, (0,)).key), counts) for round in (1, 2)]
    assert not np.array_equal(drawn[0][1], drawn[1][1])
    for tensors, seeds in drawn:
        assert np.bincount(tensors).tolist() == counts.tolist()
        assert len({*zip(tensors.tolist(), seeds.tolist(), strict=True)}) == len(seeds)  # none twice
        assert ((seeds >= 0) & (seeds < 50)).all()


def descent(*norms: float) -> Descent:
    return Descent(1, torch.zeros(0, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64).square())


@pytest.mark.parametrize(
    ("norms", "seeds", "coordinates", "expected"),
    [
        ((1, 2, 3, 4), 100, 100, [10, 20, 30, 40]),  # in proportion
        ((1, 2, 3, 4), 100, 4, [1, 1, 1, 1]),  # the fewest
        ((1, 2, 3, 4), 7, 1000, [7, 7, 7, 7]),  # all that there are
        ((1, 1, 1, 97), 20, 32, [4, 4, 4, 20]),  # the longest has no more, the others share the rest
        ((0, 0, 50, 50), 100, 102, [1, 1, 50, 50]),  # none is left without
        ((0, 0, 0), 9, 6, [2, 2, 2]),  # nothing was learnt
        ((5,), 9, 1, [1]),
        ((1,), 1, 1, [1]),
    ],
)
def test_tensors_have_directions_in_proportion_to_their_updates(
    norms: tuple[float, ...], seeds: int, coordinates: int, expected: list[int]
) -> None:
    method = Ferret(seeds=seeds, coordinates=coordinates)
    assert method._counts(descent(*norms)).tolist() == expected


def test_the_counts_always_add_up() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        norms, seeds = generator.lognormal(0, 3, 20), int(generator.integers(1, 60))
        coordinates = int(generator.integers(20, 1500))
        counts = Ferret(seeds=seeds, coordinates=coordinates)._counts(descent(*norms))
        assert counts.sum() == min(coordinates, 20 * seeds)
        assert counts.min() >= 1
        assert counts.max() <= seeds


def test_fewer_coordinates_than_tensors_is_one_line_before_anything_runs(net: Net) -> None:
    with pytest.raises(ModelError, match=r"^method\.coordinates: 7 are fewer than the 20 tensors that are trained$"):
        Ferret(coordinates=7).fits(net)
    Ferret(coordinates=len(net.names)).fits(net)
    for field in ({"seeds": 0}, {"coordinates": 0}, {"law": "tied"}, {"rank": 0}):
        with pytest.raises(ValueError, match=next(iter(field))):
            Ferret(**field)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"coordinates": torch.zeros(59, dtype=torch.float16)}, r"not torch\.float16 \[60\]"),
        ({"coordinates": torch.zeros(60)}, "torch.float32"),
        ({"coordinates": torch.full((60,), 1.01, dtype=torch.float16)}, "beyond their unit"),
        ({"coordinates": torch.full((60,), float("nan"), dtype=torch.float16)}, "beyond their unit"),
        ({"unit": 0.0}, "beyond its bounds"),
        ({"unit": float("nan")}, "beyond its bounds"),
        ({"unit": 1e6}, "beyond its bounds"),
    ],
)
def test_what_a_client_may_not_answer(change: dict[str, Any], reason: str) -> None:
    method, state = Ferret(**SMALL), descent(*range(1, 21))
    good = Coordinates(torch.ones(60, dtype=torch.float16), 1.0, 8, 0.5, 0)
    method.check(state, 0, good)
    with pytest.raises(wire.Illegal, match=reason):
        method.check(state, 0, dataclasses.replace(good, **change))


def test_a_broadcast_that_is_none_is_refused(net: Net, tmp_path: Path) -> None:
    method = Ferret(**SMALL)
    federation = Federation(method, net, tmp_path)
    down = method.broadcast(federation.state, federation.server(1, (0,)), 0, None)
    three = np.full(20, 3)
    for counts in (three + 1, np.r_[three[:-2], 0, 6], np.r_[three[:-1]], np.r_[three[:-2], -1, 7]):
        with pytest.raises(wire.Illegal, match="counts"):
            method.client_update(dataclasses.replace(down, counts=integers.pack(counts)), federation.client(0, 1))
    for change in ({"levels": b""}, {"levels": integers.pack(np.zeros(99, np.int64))}, {"grid": float("inf")}):
        with pytest.raises(wire.Illegal):
            method.receive(dataclasses.replace(down, **change), federation.client(0, 1))
    with pytest.raises(wire.Illegal, match="bounds"):
        method.receive(dataclasses.replace(down, levels=integers.pack(np.full(100, 3)), grid=6e4),
                       federation.client(0, 1))  # fmt: skip


def test_one_reply_does_not_set_the_grid(net: Net, tmp_path: Path) -> None:
    method = Ferret(**SMALL)
    state = Federation(method, net, tmp_path).state
    sent = torch.linspace(-1, 1, 60).half()
    grids = []
    for unit in (1.0, 6e4):
        replies = [(id, Coordinates(sent, unit if id == 1 else 1.0, 8, 0.5, 0)) for id in range(4)]
        server = Federation(method, net, tmp_path).server(1, range(4))
        grids.append(method.aggregate(state, server, iter(replies))[0].grid)
    assert grids[0] < grids[1] < 8 * grids[0]


def test_the_largest_that_is_legal_for_ever_ends_no_run(net: Net, tmp_path: Path) -> None:
    method = Ferret(**(SMALL | {"steps": 1}), server_step={"kind": "plain", "lr": 10.0})
    federation = Federation(method, net, tmp_path, sizes=(8,))
    state, most = federation.state, Coordinates(torch.ones(60, dtype=torch.float16), 6e4, 8, 0.5, 0)
    for round in range(1, 4):
        method.check(state, 0, most)
        state, _ = method.aggregate(state, federation.server(round, (0,)), iter([(0, most)]))
        method.receive(method.broadcast(state, federation.server(round + 1, (0,)), 0, None), federation.client(0, 1))
    assert state.gains.abs().max() == 6e4


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> Net:
    """Five tensors of 32 numbers are trained."""
    folder = tmp_path_factory.mktemp("norms")
    tiny_net(folder)
    return Net.open(str(folder), remember=True, trainable=lambda name: "norm" in name)


@pytest.mark.parametrize("count", [32, 16])
def test_along_as_many_orthogonal_directions_as_numbers_it_is_fedavg(
    count: int, norms: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To what float16 leaves of the coordinates; along half as many it is far from it."""
    draw = torch.Generator().manual_seed(0)
    z = {n: 32**0.5 * torch.linalg.qr(torch.randn(32, 32, generator=draw, dtype=torch.float64))[0] for n in norms.names}
    monkeypatch.setattr(ferret, "project", lambda _, x, name, seeds: (z[name][seeds] @ x.double().flatten()).numpy())
    fields: dict[str, Any] = {"lr": 0.3, "steps": 3, "batch_size": 4, "optimiser": "sgd", "clip": 0.0}
    mine = Federation(Ferret(**fields, seeds=32, coordinates=5 * count), norms, tmp_path / "a", rounds=1).run()
    theirs = Federation(FedAvg(**fields), norms, tmp_path / "b", rounds=1).run()
    for name, gains in zip(norms.names, mine.state.gains.view(5, 32), strict=True):
        moved = norms.base[name].double() - theirs.state.weights[name].double()
        apart = float((gains @ z[name] - moved).norm() / moved.norm())
        assert apart < 1e-3 if count == 32 else apart > 0.3


def test_over_the_keys_the_mean_of_what_it_adds_is_the_update(
    norms: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along 4 directions of 32 numbers each is off by |D| sqrt(32 / 4), and the mean of many by ever less."""
    draw, count = torch.Generator().manual_seed(1), 100
    update = {name: torch.randn(32, generator=draw) for name in norms.names}
    monkeypatch.setattr(
        Ferret, "train", lambda *_, **__: Local(0.5, 0, [norms.base[n].float() - d for n, d in update.items()])
    )
    method = Ferret(seeds=64, coordinates=20)
    federation = Federation(method, norms, tmp_path, sizes=(8,))
    total, squares = {name: torch.zeros(32, dtype=torch.float64) for name in norms.names}, list[float]()
    for key in range(count):
        server = dataclasses.replace(federation.server(1, (0,)), key=Key.root(key))
        state = method.init(server)
        up = method.client_update(method.broadcast(state, server, 0, None), federation.client(0, 1))
        state, _ = method.aggregate(state, server, iter([(0, up)]))
        directions = method._pool(state.pool).directions
        for name, gains in zip(norms.names, state.gains.view(5, 64).numpy(), strict=True):
            made = directions.apply(torch.zeros(32, dtype=torch.float64), name, range(64), gains)
            squares.append(float((made - update[name]).square().sum() / update[name].square().sum()))
            total[name] += made / count
    assert np.mean(squares) == pytest.approx(32 / 4, rel=0.15)
    for name, mean in total.items():
        assert float((mean - update[name]).norm() / update[name].norm()) < 2 * (8 / count) ** 0.5
