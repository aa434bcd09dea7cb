"""Replies that come a round late: they count as that round meant them, once, and whoever is late is asked nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import closed_data
from rows import ROWS, SEEDS, Nets, net_for, opened
from slow import Forge, Slow

from thinwire import wire
from thinwire.aggregate.weights import Agreement
from thinwire.compress.feedback import DEBT, on_grid
from thinwire.core import Averaged, Method
from thinwire.keys import Key
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.methods.onebit import NUMBERS, OneBit
from thinwire.model.net import Net
from thinwire.perturb.pool import TILTS, draws_key, seed_tilts
from thinwire.runtime import course
from thinwire.runtime.cohort import All, Only
from thinwire.runtime.course import Course, Job, read_records
from thinwire.wire import Frame

SIZES = (12, 8, 16)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    return opened(tmp_path_factory.mktemp("model"))


def begun(
    method: Method,
    net: Net,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    slow: set[tuple[int, int]],
    forge: Forge = lambda frame: frame,
    stale: float = 1.0,
    **changes: Any,
) -> Course:
    """A run of three clients that has begun; the transport has who is late."""
    fields: dict[str, Any] = {
        "method": method,
        "net": net,
        "clients": [closed_data(net, rows, rows) for rows in SIZES],
        "names": ["a", "b", "c"],
        "folder": folder,
        "run": 7,
        "key": Key.root(3),
        "rounds": 4,
        "segments": [All()],
        "evaluate": list,
        "late": 1,
        "weights": Agreement(stale=stale),
    }
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(course, "InProcess", lambda endpoint: Slow(endpoint, slow, forge))
        run = Course(Job(**(fields | changes)))
    run.begin()
    return run


def states(run: Course) -> list[Any]:
    """The state before the first round, and after each."""
    found = [run.state]
    while not run.ended:
        run.round()
        found.append(run.state)
    return found


def visit(run: Course, round: int, client: int = 1) -> dict[str, Any]:
    """The record of a client's visit."""
    record = read_records(run.rounds)[round - 1]
    return next(dict(line) for line in record["clients"] if line["id"] == client)


@pytest.mark.parametrize("stale", [1.0, 0.5])
@pytest.mark.parametrize("pro", [False, True])
def test_a_late_reply_of_fedkseed_is_the_sum_of_its_own_round(
    pro: bool, stale: float, nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directions are those of the round it was asked in, its rate too, and its weight fades: term by term."""
    method = FedKSeed(**(SEEDS | {"seeds": 32}), pro=pro, schedule="linear", scalars="float32")
    seen: dict[tuple[int, int], Any] = {}

    def noted(frame: Frame) -> Frame:
        seen[frame.header().round, frame.header().client] = wire.decode(method.Up, Frame(bytes(frame)))
        return frame

    run = begun(method, net_for("fedkseed", nets), tmp_path / "run", monkeypatch, {(2, 1)}, noted, stale)

    def seen_by(round: int, client: int, up: Any) -> None:
        seen[round, client] = up

    run.job.seen = seen_by
    before = states(run)
    want = before[2].gains.numpy().copy()  # of the third round, in which client 1's reply of the second comes
    counts = {(3, 0): 12.0, (3, 2): 16.0, (2, 1): stale * 8}
    for (round, client), count in counts.items():
        state, up = before[round - 1], seen[round, client]
        shares = TILTS[seed_tilts(state.amplitude / state.visits)] if pro else None
        key = draws_key(run.seats.server(round, ()).key)
        picks = method._pool(state.pool).picks(key, [client], (method.steps, 1), shares)[0, :, 0]
        for direction, scalar in zip(picks, up.scalars.double().numpy() * up.unit, strict=True):
            want[direction] += method.lr * (1 - (round - 1) / 4) * scalar * count / sum(counts.values())
    np.testing.assert_allclose(before[3].gains.numpy(), want, rtol=1e-12, atol=1e-18)
    assert visit(run, 2)["error"] == "late"
    found = visit(run, 3)
    assert (found["late"], found["bytes_down"], found["why"]) == (1, 0, "by examples, late by 1")
    assert found["share"] == pytest.approx(stale * 8 / (28 + stale * 8))
    assert found["bytes_up"] > 0
    assert "late" not in visit(run, 4)


def test_who_is_late_is_not_asked_and_comes_back(nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(ROWS["fedkseed"].method, net_for("fedkseed", nets), tmp_path / "run", monkeypatch, {(1, 1), (3, 0)})
    states(run)
    assert isinstance(run.transport, Slow)
    assert {(round, client) for round in range(1, 5) for client in range(3)} - {*run.transport.asked} == {
        (2, 1),
        (4, 0),
    }
    # who is late also counts where the next round has not drawn it
    segments = [All(rounds=1), Only(clients=(0, 2))]
    run = begun(
        ROWS["fedkseed"].method, net_for("fedkseed", nets), tmp_path / "few", monkeypatch, {(1, 1)}, segments=segments
    )
    states(run)
    assert [line["id"] for line in read_records(run.rounds)[1]["clients"]] == [0, 2, 1]
    assert visit(run, 2)["share"] == pytest.approx(8 / 36)


def test_all_of_a_round_may_be_late(nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = {(1, 0), (1, 1), (1, 2)}
    run = begun(ROWS["fedkseed"].method, net_for("fedkseed", nets), tmp_path / "run", monkeypatch, late, rounds=2)
    first, second, third = states(run)
    assert torch.equal(first.gains, second.gains)
    on_time = begun(ROWS["fedkseed"].method, net_for("fedkseed", nets), tmp_path / "on time", monkeypatch, set())
    on_time.round()
    torch.testing.assert_close(third.gains, on_time.state.gains, rtol=1e-12, atol=0)


@pytest.mark.parametrize("row", ["onebit", "onebit-part"])
def test_debts_are_paid_once_where_replies_are_late(
    row: str, nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each client: what has arrived and what is owed is what was learnt, to the bit; the server's debt likewise."""
    learnt, sent = (
        {id: torch.zeros(500, dtype=torch.float64) for id in range(3)},
        {id: torch.zeros(500, dtype=torch.float64) for id in range(3)},
    )
    means = torch.zeros(500, dtype=torch.float64)
    train, step, update_of = OneBit.train, OneBit.step, OneBit.update_of

    def trained(self: OneBit, client: Any, *args: Any, **kwargs: Any) -> Any:
        before = client.net.parameter("tied.numbers").detach().clone()
        local = train(self, client, *args, **kwargs)
        learnt[client.id] += on_grid(local.weights[0].detach().double() - before)
        return local

    def arrived(self: OneBit, state: Any, server: Any, client: int, up: Any) -> Any:
        found = update_of(self, state, server, client, up)
        sent[client] += on_grid(found.tensors[NUMBERS])
        return found

    def stepped(self: OneBit, state: Any, server: Any, mean: Any, counted: Any) -> Any:
        means.add_(on_grid(mean[NUMBERS]))
        return step(self, state, server, mean, counted)

    for name, watched in (("train", trained), ("update_of", arrived), ("step", stepped)):
        monkeypatch.setattr(OneBit, name, watched)
    run = begun(ROWS[row].method, net_for(row, nets), tmp_path / "run", monkeypatch, {(2, 1), (3, 0)}, rounds=5)
    state = states(run)[-1]
    assert [visit(run, 3)["late"], visit(run, 4, 0)["late"]] == [1, 1]
    for id in range(3):
        assert torch.equal(sent[id] + run.memories.of(id, 6)[DEBT], learnt[id]), id
    assert torch.equal(on_grid(state.numbers) + state.owed, means)


def test_a_late_difference_is_to_the_weights_it_was_made_of(
    nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[tuple[int, int], list[torch.Tensor]] = {}
    train = GradualDiff.train

    def noted(self: GradualDiff, client: Any, *args: Any, **kwargs: Any) -> Any:
        local = train(self, client, *args, **kwargs)
        trained[len(trained), client.id] = [tensor.detach().clone() for tensor in local.weights]
        return local

    monkeypatch.setattr(GradualDiff, "train", noted)
    method = GradualDiff(lr=3e-3, steps=2, batch_size=4)
    run = begun(method, net_for("gradualdiff", nets), tmp_path / "run", monkeypatch, {(1, 1)}, stale=0.5, rounds=2)
    before = [{name: tensor.clone() for name, tensor in state.weights.items()} for state in states(run)]
    own = dict(zip([(1, 0), (1, 1), (1, 2), (2, 0), (2, 2)], trained.values(), strict=True))
    counts = {(2, 0): 12.0, (2, 2): 16.0, (1, 1): 4.0}
    for i, (name, tensor) in enumerate(before[1].items()):
        want = tensor.double()
        for (round, client), count in counts.items():
            want = want + count / 32 * (own[round, client][i].double() - before[round - 1][name].double())
        torch.testing.assert_close(before[2][name].double(), want, rtol=0, atol=1e-7)


def anew(frame: Frame, **other: Any) -> Frame:
    """The same reply under another header."""
    header = frame.header()
    about = {"run": header.run, "round": header.round, "client": header.client, "held": header.held}
    return wire.encode(wire.decode(FedKSeed.Up, frame), **(about | other))


@pytest.mark.parametrize(
    ("forge", "error"),
    [
        (lambda frame: anew(frame, round=3), "Illegal: a reply of run 7, round 3, client 1"),
        (lambda frame: anew(frame, round=1), "Illegal: a reply of run 7, round 1, client 1"),
        (lambda frame: anew(frame, client=0), "Illegal: a reply of run 7, round 2, client 0"),
        (lambda frame: anew(frame, run=8), "Illegal: a reply of run 8, round 2, client 1"),
        (lambda frame: Frame(bytes(frame)[:-3]), "Corrupt"),
    ],
)
def test_a_late_frame_that_is_not_its_own_drops_that_one_alone(
    forge: Forge, error: str, nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, net = ROWS["fedkseed"].method, net_for("fedkseed", nets)
    run = begun(method, net, tmp_path / "run", monkeypatch, {(2, 1)}, forge)
    found = states(run)[-1]
    assert visit(run, 3)["error"].startswith(error)
    assert "share" not in visit(run, 3)
    segments = [All(rounds=1), Only(clients=(0, 2), rounds=2), All()]
    absent = states(begun(method, net, tmp_path / "absent", monkeypatch, set(), segments=segments))[-1]
    assert bytes(wire.encode(found)) == bytes(wire.encode(absent))


def test_a_run_that_takes_late_replies_is_the_run_that_it_was_where_nobody_is_late(
    nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, net = ROWS["onebit"].method, net_for("onebit", nets)
    with_late, without = (
        states(begun(method, net, tmp_path / str(late), monkeypatch, set(), late=late))[-1] for late in (1, 0)
    )
    assert bytes(wire.encode(with_late)) == bytes(wire.encode(without))


def test_whose_replies_may_be_late() -> None:
    """What a client adds must be a change, of which the next round's state can take as much."""
    late = {name for name, row in ROWS.items() if isinstance(row.method, Averaged) and row.method.additive}
    assert {"fedkseed", "fedkseed-pro", "onebit", "onebit-part", "gradualdiff", "gradualdiff-bf16", "cgfed"} <= late
    never = {"fedavg", "fedkseed-median", "onebit-plain", "onebit-merge", "cgfed-state", "ferret", "scaffold", "flora"}
    assert never & {*ROWS} == never
    assert not never & late


def test_clients_join_and_leave_while_another_is_late(
    nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is removed while it is late does not count and ends nothing; who joins counts beside one that is late."""
    method, net = ROWS["fedkseed"].method, net_for("fedkseed", nets)
    belong = {1: (0, 1), 2: (0, 2), 3: (0, 1, 2), 4: (0, 1, 2)}
    run = begun(method, net, tmp_path / "run", monkeypatch, {(1, 1), (3, 0)}, members=belong.__getitem__)
    found = states(run)[-1]
    lines = [[line["id"] for line in record["clients"]] for record in read_records(run.rounds)]
    assert lines == [[0, 1], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert (visit(run, 4, 0)["late"], visit(run, 4, 0)["share"] > 0) == (1, True)
    segments = [Only(clients=(0,), rounds=1), Only(clients=(0, 2), rounds=1), All()]
    absent = begun(method, net, tmp_path / "absent", monkeypatch, {(3, 0)}, segments=segments)
    assert bytes(wire.encode(found)) == bytes(wire.encode(states(absent)[-1]))
