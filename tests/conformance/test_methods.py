"""What every method keeps to: one row a method, every column a contract of the core."""

from __future__ import annotations

import dataclasses
import math
import random
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation
from pinned import other_versions
from rows import ROWS

from thinwire import wire
from thinwire.core import Method
from thinwire.methods import METHODS
from thinwire.model.net import Net
from thinwire.wire.payload import fields_of


def state_bytes(federation: Federation) -> bytes:
    return bytes(wire.encode(federation.state))


def test_every_method_has_a_row() -> None:
    assert {method.model_dump()["name"] for method, *_ in ROWS.values()} == set(METHODS)


def test_payloads_round_trip(method: Method, net: Net, tmp_path: Path) -> None:
    federation = Federation(method, net, tmp_path).run(1)
    server = federation.server(2, (0, 1, 2))
    down = method.broadcast(federation.state, server, 1, None)
    up = method.client_update(down, federation.client(1, 2))
    for payload in (federation.state, down, up):
        again = wire.decode(type(payload), wire.encode(payload))
        for field in fields_of(type(payload)):
            assert same(getattr(payload, field.name), getattr(again, field.name)), field.name


def test_two_runs_are_identical_and_another_seed_is_not(method: Method, net: Net, tmp_path: Path) -> None:
    one, two = (Federation(method, net, tmp_path / name, rounds=2).run() for name in "ab")
    assert state_bytes(one) == state_bytes(two)
    assert [at.ledger for at in one.history] == [at.ledger for at in two.history]
    assert state_bytes(Federation(method, net, tmp_path / "c", rounds=2, seed=1).run()) != state_bytes(one)


def test_going_on_from_a_decoded_state_is_the_uninterrupted_run(method: Method, net: Net, tmp_path: Path) -> None:
    whole = Federation(method, net, tmp_path / "whole", rounds=4).run()
    half = Federation(method, net, tmp_path / "half", rounds=4).run(2)
    saved = wire.decode(method.State, wire.encode(half.state))
    rest = Federation(method, net, tmp_path / "half", rounds=4, state=saved, round=2, held=half.held).run()
    assert state_bytes(rest) == state_bytes(whole)


def test_a_dirty_workspace_changes_nothing(method: Method, net: Net, tmp_path: Path) -> None:
    def scribble(net: Net) -> None:
        net.forget()  # the copy that a simulation keeps between clients
        with torch.no_grad():
            for _, parameter in net.trained():
                parameter.fill_(7.5)

    clean = Federation(method, net, tmp_path / "clean", rounds=2).run()
    dirty = Federation(method, net, tmp_path / "dirty", rounds=2, before_client=scribble).run()
    assert state_bytes(clean) == state_bytes(dirty)


def test_the_global_generators_are_untouched(method: Method, net: Net, tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()  # noqa: NPY002 - the point
    Federation(method, net, tmp_path, rounds=1).run()
    assert torch.equal(before[0], torch.get_rng_state())
    assert str(before[1]) == str(np.random.get_state(legacy=False))  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "lost", "another round", "another client", "garbage"])
def test_a_bad_reply_drops_that_client_for_the_round(damage: str, method: Method, net: Net, tmp_path: Path) -> None:
    def tamper(client: int, frame: wire.Frame) -> wire.Frame | None:
        if client != 1:
            return frame
        flipped = bytearray(bytes(frame))
        flipped[len(frame) // 2] ^= 1
        header = frame.header()
        up = wire.decode(method.Up, frame)
        return {
            "flip": wire.Frame(bytes(flipped)),
            "cut": wire.Frame(bytes(frame)[:-3]),
            "empty": wire.Frame(b""),
            "lost": None,
            "another round": wire.encode(up, run=header.run, round=header.round + 1, client=1),
            "another client": wire.encode(up, run=header.run, round=header.round, client=2),
            "garbage": wire.Frame(bytes(range(256)) * 4),
        }[damage]

    hurt = Federation(method, net, tmp_path / "hurt", rounds=2, tamper=tamper)
    at = hurt.step()
    assert at.visits[1].error
    assert at.visits[0].error is None
    absent = Federation(method, net, tmp_path / "absent", rounds=2)
    absent.step(cohort=(0, 2))
    assert state_bytes(hurt) == state_bytes(absent)


@pytest.mark.parametrize("field", ["tensors", "examples"])
def test_an_illegal_reply_is_never_averaged(field: str, method: Method, net: Net, tmp_path: Path) -> None:
    """Well-formed frames whose content no client may send: infinity in what is averaged, no examples."""

    def poison(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, torch.Tensor):
            return torch.full_like(value, math.inf) if value.is_floating_point() else torch.full_like(value, 127)
        return {name: poison(tensor) for name, tensor in value.items()}

    def tamper(client: int, frame: wire.Frame) -> wire.Frame:
        if client != 1:
            return frame
        header, up = frame.header(), wire.decode(method.Up, frame)
        if field == "examples":
            up = dataclasses.replace(up, examples=0)
        else:
            tensors = [f.name for f in fields_of(method.Up) if f.one_tensor or f.many_tensors]
            up = dataclasses.replace(up, **{name: poison(getattr(up, name)) for name in tensors})
        return wire.encode(up, run=header.run, round=header.round, client=1)

    hurt = Federation(method, net, tmp_path / "hurt", rounds=2, tamper=tamper)
    assert "Illegal" in str(hurt.step().visits[1].error)
    absent = Federation(method, net, tmp_path / "absent", rounds=2)
    absent.step(cohort=(0, 2))
    assert state_bytes(hurt) == state_bytes(absent)


def test_a_round_without_replies_changes_nothing(method: Method, net: Net, tmp_path: Path) -> None:
    federation = Federation(method, net, tmp_path, tamper=lambda client, frame: None)
    before = state_bytes(federation)
    at = federation.step()
    assert all(visit.error == "lost" for visit in at.visits.values())
    assert state_bytes(federation) == before


def test_one_reply_in_memory_at_a_time(method: Method, net: Net, tmp_path: Path) -> None:
    federation = Federation(method, net, tmp_path, rounds=1)
    server = federation.server(1, (0, 1, 2))
    seen: list[weakref.ref[Any]] = []

    def replies() -> Iterator[tuple[int, Any]]:
        for id in range(3):
            assert len([ref for ref in seen if ref() is not None]) <= 1  # the one before may still be bound
            down = method.broadcast(federation.state, server, id, None)
            up = wire.decode(method.Up, wire.encode(method.client_update(down, federation.client(id, 1))))
            seen.append(weakref.ref(up))
            yield id, up
            del up

    method.aggregate(federation.state, server, replies())
    assert len(seen) == 3


def test_materialise_is_what_the_clients_receive(method: Method, net: Net, tmp_path: Path) -> None:
    if type(method).receive is Method.receive:
        pytest.skip("its clients never receive the whole model")
    federation = Federation(method, net, tmp_path, rounds=2).run()
    method.materialise(federation.state, net)
    mine = net.state_sha256()
    net.reset()
    net.forget()
    down = method.broadcast(federation.state, federation.server(2, (0,)), 0, None)
    method.receive(wire.decode(method.Down, wire.encode(down)), federation.client(0, 2))
    assert net.state_sha256() == mine


def test_bytes_of_a_client_and_round(row: str, method: Method, net: Net, tmp_path: Path) -> None:
    at = Federation(method, net, tmp_path, rounds=1).step()
    # scalars that round otherwise pack otherwise, by a byte or two
    room = (0, 1, 2, -1, -2) if other_versions() else (0,)
    assert any(at.visits[0].bytes_down + off == ROWS[row].down for off in room)
    assert any(at.visits[0].bytes_up + off == ROWS[row].up for off in room)


def test_the_loss_falls(row: str, method: Method, net: Net, tmp_path: Path) -> None:
    assert Federation(method, net, tmp_path, rounds=10).fall() > ROWS[row].fall / 2


def test_hyper_parameters_are_frozen_and_checked(method: Method) -> None:
    with pytest.raises(ValueError, match="frozen"):
        method.lr = 1.0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="lrr"):
        type(method).model_validate({"lrr": 1.0})


def test_what_derives_from_data_is_marked(method: Method) -> None:
    """Each field of a reply is marked `release`, so that privacy can ask for noise on all of them."""
    assert all(f.metadata.get("release") for f in dataclasses.fields(method.Up))


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, Iterable) and not isinstance(one, str | bytes | list):
        return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
    return bool(one == two)
