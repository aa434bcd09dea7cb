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
from federation import Federation, tiny_net

from thinwire import wire
from thinwire.core import Method
from thinwire.evaluate.loss import mean_loss
from thinwire.methods import METHODS
from thinwire.methods.cgfed import CGFed
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedzo import FedZO
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.model.net import Net
from thinwire.model.views import Lora
from thinwire.wire.payload import fields_of

SEEDS: dict[str, Any] = {"seeds": 64, "lr": 2e-4, "eps": 1e-3, "steps": 8, "batch_size": 4}
# name -> (the method, set so that its loss falls on the tiny model; bytes down and up of a client and round, a range
# where they depend on the weights)
ROWS: dict[str, tuple[Method, tuple[int | range, int | range]]] = {
    "fedavg": (FedAvg(lr=3e-3, steps=4, batch_size=4), (108_395, 108_397)),
    "fedavg-sgd": (FedAvg(lr=0.5, steps=4, batch_size=4, optimiser="sgd", weighting="uniform"), (108_395, 108_397)),
    "fedit": (FedAvg(lr=1e-2, steps=4, batch_size=4), (4_096, 4_098)),
    "fedkseed": (FedKSeed(**SEEDS), (97, 100)),
    "fedkseed-lora": (FedKSeed(**(SEEDS | {"lr": 3e-3})), (97, 100)),
    "fedkseed-pro": (FedKSeed(**SEEDS, pro=True), (116, 100)),
    "fedkseed-paper": (FedKSeed(**SEEDS, wire="paper"), (336, 117)),
    "fedkseed-paper-pro": (FedKSeed(**SEEDS, wire="paper", pro=True), (594, 117)),
    "fedkseed-gaussian": (FedKSeed(**SEEDS, law="gaussian", together=True), (97, 100)),
    "fedkseed-lowrank": (FedKSeed(**SEEDS, law="lowrank", rank=2, queries=2, scalars="float32"), (97, 148)),
    "gradualdiff": (GradualDiff(lr=3e-3, steps=4, batch_size=4), (range(100_000), range(100_000))),
    "gradualdiff-shared": (
        GradualDiff(lr=3e-3, steps=4, batch_size=4, start="shared", rounding="nearest", server="momentum"),
        (range(100_000), range(100_000)),
    ),
    "gradualdiff-lora": (GradualDiff(lr=1e-2, steps=4, batch_size=4), (range(5_000), range(5_000))),
    "gradualdiff-bf16": (GradualDiff(lr=3e-3, steps=4, batch_size=4), (range(60_000), range(60_000))),
    "gradualdiff-residue": (
        GradualDiff(lr=3e-3, steps=4, batch_size=4, rounding="residue", server="adam", server_lr=3e-3),
        (range(60_000), range(60_000)),
    ),
    "gradualdiff-int4": (
        GradualDiff(lr=3e-3, steps=4, batch_size=4, codec="blocks", bits=4),
        (range(100_000), range(20_000)),
    ),
    "gradualdiff-lowrank": (
        GradualDiff(lr=3e-3, steps=4, batch_size=4, codec="lowrank", rank=4),
        (range(60_000), range(12_000)),
    ),
    "gradualdiff-eden": (
        GradualDiff(lr=3e-3, steps=4, batch_size=4, codec="eden", bits=1),
        (range(100_000), range(6_000)),
    ),
    "gradualdiff-topk": (
        GradualDiff(lr=3e-3, steps=4, batch_size=4, codec="topk", share=0.05, gate=True, server="yogi", server_lr=3e-3),
        (range(60_000), range(4_000)),
    ),
    "fedcybgd": (
        FedCyBGD(lr=1e-2, steps=4, batch_size=4, blocks=2, common=0, drop=0.5, prune=0.5, spared=(0, 0)),
        (range(50_000), range(40_000)),
    ),
    "fedcybgd-parallel": (
        FedCyBGD(
            lr=1e-2,
            steps=4,
            batch_size=4,
            blocks=2,
            extra=("embeddings",),
            variant="parallel",
            damping=0.5,
            around="4bit",
            coded=False,
            rounding="nearest",
            order="random",
        ),
        (range(110_000), range(100_000)),
    ),
    "fedcybgd-full": (FedCyBGD(lr=3e-3, steps=4, batch_size=4, variant="full"), (range(110_000), range(110_000))),
    "cgfed": (CGFed(lr=1e-2, steps=4, batch_size=4, ratio=16), (range(60_000), range(400))),
    "cgfed-eden": (CGFed(lr=1e-2, steps=4, batch_size=4, codec="eden", ratio=32), (range(4_300), range(300))),
    "cgfed-coded": (
        CGFed(lr=1e-2, steps=4, batch_size=4, codec="powersgd", ratio=16, feedback=True, gate=0.2, downlink="coded"),
        (range(4_300), range(400)),
    ),
    "cgfed-state": (
        CGFed(lr=1e-2, steps=4, batch_size=4, codec="none", encode="state", spared=0.3),
        (range(4_300), range(3_800)),
    ),
    "fedzo": (FedZO(**(SEEDS | {"seeds": 1 << 32})), (108_411, 108_397)),
}


VIEWS = {
    "cgfed",
    "cgfed-coded",
    "cgfed-eden",
    "cgfed-state",
    "fedit",
    "fedkseed-lora",
    "gradualdiff-lora",
}  # rows that run on a LoRA view of the model
HALVES = {"gradualdiff-bf16", "gradualdiff-lowrank", "gradualdiff-residue", "gradualdiff-topk"}  # rows in bfloat16


def opened(folder: Path) -> tuple[Net, Net, Net]:
    """The tiny model whole, as a LoRA view, and in bfloat16."""
    view = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
    half = tiny_net(folder, "bfloat16")
    return tiny_net(folder), Net.open(str(folder), remember=True, view=view), half


def net_for(row: str, nets: tuple[Net, Net, Net]) -> Net:
    """The one that a row runs on."""
    return nets[1 if row in VIEWS else 2 if row in HALVES else 0]


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Net, Net]:
    return opened(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=list(ROWS))
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def net(row: str, nets: tuple[Net, Net, Net]) -> Net:
    return net_for(row, nets)


@pytest.fixture
def method(row: str) -> Method:
    return ROWS[row][0]


def state_bytes(federation: Federation) -> bytes:
    frame = wire.encode(federation.state)
    assert isinstance(frame, bytes)
    return frame


def test_every_method_has_a_row() -> None:
    assert {method.model_dump()["name"] for method, _ in ROWS.values()} == set(METHODS)


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
            for _, parameter in net.parameters():
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
        assert isinstance(frame, bytes)
        flipped = bytearray(frame)
        flipped[len(frame) // 2] ^= 1
        header = wire.peek(frame)
        up = wire.decode(method.Up, frame)
        return {
            "flip": bytes(flipped),
            "cut": frame[:-3],
            "empty": b"",
            "lost": None,
            "another round": wire.encode(up, run=header.run, round=header.round + 1, client=1),
            "another client": wire.encode(up, run=header.run, round=header.round, client=2),
            "garbage": bytes(range(256)) * 4,
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
        header, up = wire.peek(frame), wire.decode(method.Up, frame)
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
    for sent, known in zip((at.visits[0].bytes_down, at.visits[0].bytes_up), ROWS[row][1], strict=True):
        assert sent in known if isinstance(known, range) else sent == known


def test_the_loss_falls(method: Method, net: Net, tmp_path: Path) -> None:
    federation = Federation(method, net, tmp_path, rounds=10)
    method.materialise(federation.state, net)
    before, _ = mean_loss(net.model, federation.data[0], 16)
    federation.run()
    method.materialise(federation.state, net)
    after, _ = mean_loss(net.model, federation.data[0], 16)
    assert after < before - 0.01


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
