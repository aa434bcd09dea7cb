"""onebit: nothing is lost, all hold the same bits, nobody pays twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation
from rows import MODELS, ROWS, tiny_net

from thinwire import wire
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import to_tensor
from thinwire.compress.feedback import DEBT, on_grid
from thinwire.config.schema import Model
from thinwire.core import StaleVersion
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.onebit import MISSED, NUMBERS, OneBit
from thinwire.model.net import Net
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST

METHOD = ROWS["onebit"].method
assert isinstance(METHOD, OneBit)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    folder = tmp_path_factory.mktemp("model")
    tiny_net(folder)
    return Net.open(str(folder), remember=True, view=Model.model_validate(MODELS["tied factors"]).view)


def test_without_a_code_it_is_the_plain_mean_bit_for_bit(net: Net, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "steps": 4, "batch_size": 4, "schedule": "linear", "moments": "kept"}
    ours = Federation(OneBit.model_validate(settings | {"code": "none"}), net, tmp_path / "ours").run()
    plain = Federation(FedAvg(**settings), net, tmp_path / "plain").run()
    assert torch.equal(ours.state.numbers, plain.state.weights["tied.numbers"])
    assert ours.state.numbers.abs().max() > 0


def test_what_was_sent_and_what_is_owed_is_what_was_learnt(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each client, and at the server: the sum of the means is where the numbers are, and what is owed."""
    learnt, sent = {id: torch.zeros(500, dtype=torch.float64) for id in range(3)}, {}
    means = torch.zeros(500, dtype=torch.float64)
    train, step, update = OneBit.train, OneBit.step, OneBit.update
    arrived: list[torch.Tensor] = []

    def trained(self: OneBit, client: Any, *args: Any, **kwargs: Any) -> Any:
        before = client.net.parameter("tied.numbers").detach().clone()
        local = train(self, client, *args, **kwargs)
        learnt[client.id] += on_grid(local.weights[0].detach().double() - before)
        return local

    def updated(self: OneBit, state: Any, server: Any, up: Any) -> Any:
        found = update(self, state, server, up)
        arrived.append(found.tensors[NUMBERS])
        return found

    def stepped(self: OneBit, state: Any, server: Any, mean: Any, counted: Any) -> Any:
        means.add_(on_grid(mean[NUMBERS]))
        return step(self, state, server, mean, counted)

    for name, watched in (("train", trained), ("update", updated), ("step", stepped)):
        monkeypatch.setattr(OneBit, name, watched)
    federation = Federation(METHOD, net, tmp_path, rounds=5)
    for round in range(1, 6):
        cohort = (0, 1, 2) if round != 3 else (0, 2)  # one is absent once
        arrived.clear()
        federation.step(cohort)
        for id, tensor in zip(cohort, arrived, strict=True):
            sent[id] = sent.get(id, 0) + on_grid(tensor)
    for id in range(3):
        assert torch.equal(sent[id] + federation.memories.of(id, 6)[DEBT], learnt[id])
    assert torch.equal(on_grid(federation.state.numbers) + federation.state.owed, means)


@pytest.mark.parametrize("missed", [0, 1, 5, MISSED, "all", "unknown"])
def test_whoever_comes_holds_the_same_bits(missed: int | str, net: Net, tmp_path: Path) -> None:
    """Who returns, who has missed five rounds, who is new: each fold of what is sent is the server's state."""
    whole = Federation(METHOD, net, tmp_path, rounds=12)
    states = [whole.state]
    for _ in range(10):
        whole.step((0, 2))
        states.append(whole.state)
    state, server = whole.state, whole.server(11, (1,))
    held = None if missed == "all" else "0" * 32 if missed == "unknown" else states[10 - int(missed)].version
    client = whole.client(1, 11)
    if isinstance(missed, int):
        client.versions.put({NUMBERS: states[10 - missed].numbers})
    down = METHOD.broadcast(state, server, 1, held)
    assert (down.levels is None) == isinstance(missed, int)
    assert len(down.changes) == (missed if isinstance(missed, int) else 0)
    METHOD.receive(down, client)
    assert torch.equal(net.parameter("tied.numbers"), state.numbers)
    assert client.held == state.version


def test_who_is_new_in_round_1_is_sent_nothing_and_later_what_is_shorter(net: Net, tmp_path: Path) -> None:
    federation = Federation(METHOD, net, tmp_path, rounds=12)
    for missed in (0, 1, 2):  # the start follows from the key: who is new has missed these rounds
        down = METHOD.broadcast(federation.state, federation.server(missed + 1, (1,)), 1, None)
        assert (down.base, down.levels, len(down.changes)) == (None, None, missed)
        METHOD.receive(down, federation.client(1, missed + 1))
        assert torch.equal(net.parameter("tied.numbers"), federation.state.numbers)
        federation.step((0, 2))


def test_asked_twice_in_a_round_it_pays_its_debt_once(net: Net, tmp_path: Path) -> None:
    once, twice = Federation(METHOD, net, tmp_path / "once"), Federation(METHOD, net, tmp_path / "twice")
    for federation in (once, twice):
        federation.step()
    seats, down = twice.seats, METHOD.broadcast(twice.state, twice.server(2, (0, 1, 2)), 0, twice.held[0])
    client = seats.client(0, 2)
    lost = METHOD.client_update(down, client)  # it never arrives
    twice.memories.commit(client.memory, 0)
    for federation in (once, twice):
        federation.step()
    assert torch.equal(once.state.numbers, twice.state.numbers)
    assert torch.equal(once.memories.of(0, 3)[DEBT], twice.memories.of(0, 3)[DEBT])
    assert lost.change.numel() == Blocks(1, 1024).size(500)


def test_a_version_that_is_not_held_is_stale(net: Net, tmp_path: Path) -> None:
    federation = Federation(METHOD, net, tmp_path).run(2)
    down = METHOD.broadcast(federation.state, federation.server(3, (0,)), 0, federation.held[0])
    with pytest.raises(StaleVersion):
        METHOD.receive(replace(down, base="f" * 32), federation.client(0, 3))


def test_a_version_of_other_numbers_is_stale(net: Net, tmp_path: Path) -> None:
    federation = Federation(METHOD, net, tmp_path).run(2)
    down = METHOD.broadcast(federation.state, federation.server(3, (0,)), 0, federation.held[0])
    for other in ({NUMBERS: torch.zeros(7)}, {"weights": torch.zeros(500)}):
        client = federation.client(0, 3)
        with pytest.raises(StaleVersion):
            METHOD.receive(replace(down, base=client.versions.put(other)), client)


Change = Callable[[Any], dict[str, Any]]
WRONG: dict[str, Change] = {
    "changes without keys": lambda down: {"keys": []},
    "more changes than are kept": lambda down: {
        "changes": {str(i): down.changes["0"] for i in range(9)},
        "keys": [1] * 9,
    },
    "a change that is cut": lambda down: {"changes": {"0": down.changes["0"][:-1]}},
    "a change of floats": lambda down: {"changes": {"0": down.changes["0"].float()}},
    "a scale that is not finite": lambda down: {"changes": {"0": torch.full_like(down.changes["0"], 0xFF)}},
    "levels that are cut": lambda down: {"levels": torch.zeros(7, dtype=torch.uint8)},
    "a change beyond all": lambda down: {
        "changes": {"0": to_tensor(Blocks(1, 1024).encode(torch.full((500,), 1e30), 0))}
    },
    "another change": lambda down: {"changes": {"0": down.changes["0"] ^ 1}},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_broadcast_that_is_none_is_refused_in_a_line(wrong: str, net: Net, tmp_path: Path) -> None:
    federation = Federation(METHOD, net, tmp_path).run(2)
    down = METHOD.broadcast(federation.state, federation.server(3, (0,)), 0, federation.state.start)
    first = replace(down, changes={"0": down.changes["0"]}, keys=down.keys[:1])
    client = federation.client(0, 3)
    with pytest.raises(Illegal):
        METHOD.receive(replace(first, **WRONG[wrong](first)), client)
    assert client.held == federation.held[0]


def test_a_round_in_which_nothing_changes_keeps_the_version(net: Net, tmp_path: Path) -> None:
    federation = Federation(METHOD, net, tmp_path).run(2)
    mean = {NUMBERS: -federation.state.owed.float()}
    state, _ = METHOD.step(federation.state, federation.server(3, ()), mean, [])
    assert state.version == federation.state.version
    down = METHOD.broadcast(state, federation.server(4, (0,)), 0, federation.held[0])
    client = federation.client(0, 4)
    METHOD.receive(down, client)
    assert client.held == state.version


def test_the_largest_that_is_legal_for_ever_ends_no_run(net: Net, tmp_path: Path) -> None:
    """One client sends the most that it may in every round; what all hold stays finite, and the rounds go on."""
    most = Blocks(1, 1024).encode(torch.full((500,), 5.9e4), 0)

    def tamper(client: int, frame: wire.Frame) -> wire.Frame:
        header = frame.header()
        up = replace(wire.decode(METHOD.Up, frame), change=to_tensor(most))
        return frame if client else wire.encode(up, run=header.run, round=header.round, client=0, held=header.held)

    federation = Federation(METHOD, net, tmp_path, rounds=20, tamper=tamper).run()
    assert all(visit.error is None for at in federation.history for visit in at.visits.values())
    assert torch.isfinite(federation.state.numbers).all()
    assert torch.isfinite(federation.state.owed).all()
    assert federation.state.numbers.abs().max() <= LARGEST * 1.01
