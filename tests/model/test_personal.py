"""What of a view stays at a client: trained there from visit to visit, in no frame, and nobody else's."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from federation import Federation, closed_data
from tiny import tiny_folder
from torch import Tensor

from thinwire import assemble, config, wire
from thinwire.compress.coding import Coding
from thinwire.core import Method
from thinwire.evaluate.clients import Evaluation
from thinwire.methods.cgfed import CGFed
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.methods.onebit import OneBit
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.personal import PREFIX, at_home
from thinwire.model.views import Full, Lora
from thinwire.model.views.keep import kept
from thinwire.runtime.endpoint import ACTIONS, Endpoint
from thinwire.runtime.payloads import Scores
from thinwire.train.kept import Kept
from thinwire.train.local import Rule, train_locally
from thinwire.wire.payload import Spec

STEPS: dict[str, Any] = {"lr": 1e-2, "steps": 2, "batch_size": 4}
WHOLE = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
PARTED = WHOLE.model_copy(update={"keep": ("*.B",)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("personal") / "model")


@pytest.fixture(scope="module")
def net(folder: Path) -> Net:
    return Net.open(str(folder), remember=True, view=PARTED)


def own(federation: Federation, client: int) -> dict[str, Tensor]:
    """What a client keeps of the net after the rounds so far."""
    memory = federation.memories.of(client, federation.round + 1)
    return {name.removeprefix(PREFIX): tensor for name, tensor in memory.items() if name.startswith(PREFIX)}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_patterns_are_of_names_and_of_a_factors_short_one() -> None:
    names = [f"m.{i}.q_proj.lora_{side}.default.weight" for i in (0, 1) for side in "AB"]
    assert kept(names, ("*.B",)) == (names[1], names[3])
    assert kept(names, ("m.0.*", "*lora_A*")) == tuple(names[:3])
    assert kept(names, ()) == ()
    with pytest.raises(ModelError, match=r"keep: \*.C hits nothing that is trained; there are names in q_proj.A, "):
        kept(names, ("*.B", "*.C"))
    with pytest.raises(ModelError, match="nothing be shared"):
        kept(names, ("*.B", "*.A"))


def test_no_frame_has_a_name_or_a_number_of_what_stays(folder: Path, net: Net, tmp_path: Path) -> None:
    frames: list[bytes] = []
    Federation(FedAvg(**STEPS), net, tmp_path / "a", rounds=2, watch=frames.append).run()  # type: ignore[arg-type]
    whole, longer = Net.open(str(folder), view=WHOLE), list[bytes]()
    Federation(FedAvg(**STEPS), whole, tmp_path / "b", rounds=2, watch=longer.append).run()  # type: ignore[arg-type]
    specs = {name: Spec.of(whole.parameter(name)) for name in net.personal}
    entries = sum(len(msgpack.packb({name: spec.packed()})) - 1 for name, spec in specs.items())
    assert {len(b) - len(a) for a, b in zip(frames, longer, strict=True)} == {
        entries + sum(spec.nbytes for spec in specs.values())
    }
    assert all(b"lora_A" in bytes(frame) and b"lora_B" not in bytes(frame) for frame in frames)


def test_clients_differ_in_what_stays_and_in_nothing_else(net: Net, tmp_path: Path) -> None:
    federation = Federation(FedAvg(**STEPS), net, tmp_path, rounds=2).run()
    mine, other = own(federation, 0), own(federation, 1)
    assert list(mine) == list(net.personal) == list(other)
    assert all(not torch.equal(mine[name], other[name]) for name in mine)
    assert all(tensor.any() for tensor in mine.values())
    seen = []
    for id in (0, 1):
        client = federation.client(id, 3)
        with at_home(net, client.memory, remember=False):
            federation.method.receive(
                federation.method.broadcast(federation.state, federation.server(3, ()), id, None), client
            )
            seen.append({name: p.detach().clone() for name, p in net.trained()})
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in net.names)
    assert same({name: seen[1][name] for name in net.personal}, other)
    assert all(torch.equal(p, net.base[name]) for name, p in net.personal.items())  # as a server evaluates it


@pytest.mark.parametrize("moments", ["fresh", "kept"])
def test_one_client_alone_learns_what_local_training_does(moments: Any, net: Net, tmp_path: Path) -> None:
    method = FedAvg(**STEPS, moments=moments)
    federation = Federation(method, net, tmp_path, rounds=2, sizes=(12,)).run()
    shared, stays = federation.state.weights, own(federation, 0)
    net.reset()
    names, memory = [name for name, _ in net.trained()], dict[str, Tensor]()
    for round in (1, 2):
        batches = federation.data[0].batches(federation.client(0, round).key.fold("batches"), 4)
        keeper = Kept(memory, names) if moments == "kept" else None
        rule = Rule("adamw", 1e-2, 2, clip=1.0)
        train_locally(net.model, [p for _, p in net.trained()], batches, rule, kept=keeper)
    found = {name: p.detach().clone() for name, p in net.trained()}
    net.reset()
    assert same({name: found[name] for name in net.personal}, stays)
    assert same({name: found[name] for name in net.names}, shared)


METHODS = {
    "fedavg": FedAvg(**STEPS),
    "onebit": OneBit(**STEPS),
    "onebit, plain": OneBit(**STEPS, code=Coding(name="none")),
    "gradualdiff": GradualDiff(**STEPS, rounding="residue"),
    "cgfed": CGFed(**STEPS, codec="eden", ratio=32, feedback=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_going_on_and_being_asked_twice_change_nothing(name: str, net: Net, tmp_path: Path) -> None:
    method: Method = METHODS[name]
    whole = Federation(method, net, tmp_path / "whole", rounds=3).run()
    half = Federation(method, net, tmp_path / "half", rounds=3).run(1)
    saved = wire.decode(method.State, wire.encode(half.state))
    rest = Federation(method, net, tmp_path / "half", rounds=3, state=saved, round=1, held=half.held)
    endpoint = Endpoint(method, rest.seats, ACTIONS)
    server = rest.server(2, (0, 1, 2))
    frame = wire.encode(method.broadcast(saved, server, 1, rest.held.get(1)), run=1, round=2, client=1)
    first = endpoint.answer("train", frame)  # whose reply is lost
    assert bytes(endpoint.answer("train", frame)) == bytes(first)
    rest.run()
    assert bytes(wire.encode(rest.state)) == bytes(wire.encode(whole.state))
    for id in range(3):
        assert same(own(rest, id), own(whole, id))
        assert any(tensor.any() for tensor in own(whole, id).values())


def test_an_evaluation_at_a_client_is_of_its_own_parts(net: Net, tmp_path: Path) -> None:
    method = FedAvg(lr=3e-2, steps=6, batch_size=4)
    federation = Federation(method, net, tmp_path, rounds=2).run()
    settings = config.Eval()
    evaluation = Evaluation(dict(enumerate(federation.data)), False, settings)
    endpoint = Endpoint(method, federation.seats, {"evaluate": evaluation})

    def loss() -> float:
        down = method.broadcast(federation.state, federation.server(2, ()), 0, None)
        answer = endpoint.answer("evaluate", wire.encode(down, run=1, round=2, client=0))
        return wire.decode(Scores, answer).loss

    mine = loss()
    federation.memories.rewind(0)  # a client without them begins with the start's
    assert mine < loss() - 0.1


def test_memory_of_another_shape_is_none(net: Net) -> None:
    name = next(iter(net.personal))
    memory = {PREFIX + n: torch.ones(p.shape) for n, p in net.personal.items()}
    with at_home(net, memory, remember=False):
        assert (net.personal[name] == 1).all()
    memory[PREFIX + name] = torch.ones(2, 2)
    with at_home(net, memory, remember=True):
        assert all(not p.any() for p in net.personal.values())
    assert not any(tensor.any() for tensor in memory.values())


def test_a_visit_that_fails_leaves_nothing(net: Net) -> None:
    memory: dict[str, Tensor] = {}

    def fail() -> None:
        with at_home(net, memory, remember=True), torch.no_grad():
            for parameter in net.personal.values():
                parameter.fill_(3.0)
            raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        fail()
    assert memory == {}
    assert not any(p.any() for p in net.personal.values())


def test_parts_of_the_whole_model_stay_too(folder: Path, tmp_path: Path) -> None:
    net = Net.open(str(folder), view=Full(keep=("model.layers.1.*",)))
    assert net.size + sum(p.numel() for p in net.personal.values()) == sum(p.numel() for p in net.model.parameters())
    data = closed_data(net, 8, 1)
    federation = Federation(FedAvg(**STEPS), net, tmp_path, rounds=1, sizes=(len(data.examples),)).run()
    assert not any(name.startswith("model.layers.1.") for name in federation.state.weights)
    assert any(not torch.equal(t, net.base[n]) for n, t in own(federation, 0).items())


def tree(folder: Path, method: dict[str, Any], view: dict[str, Any]) -> dict[str, Any]:
    return {"name": "keep", "model": {"path": str(folder), "view": view}, "data": {"path": "x.jsonl"}, "method": method}


@pytest.mark.parametrize(
    ("method", "view", "why"),
    [
        ({"name": "fedkseed"}, {"kind": "lora", "keep": ["*.B"]}, "view.keep: fedkseed trains nothing that stays"),
        ({"name": "fedcybgd"}, {"kind": "full", "keep": ["*norm*"]}, "view.keep: fedcybgd trains nothing that stays"),
        ({"name": "fedavg"}, {"kind": "lora", "keep": ["*.C"]}, r"view.keep: \*.C hits nothing"),
        ({"name": "fedavg"}, {"kind": "filter", "keep": ["*"]}, "nothing be shared"),
        ({"name": "cgfed", "encode": "gradient", "codec": "eden"}, {"kind": "lora", "keep": ["*.B"]}, "no step"),
        ({"name": "fedavg"}, {"kind": "tied", "keep": ["*"]}, "view.keep: the numbers of a tied view have no parts"),
    ],
)
def test_what_cannot_stay_is_one_line(method: Any, view: dict[str, Any], why: str, folder: Path) -> None:
    with pytest.raises((ModelError, config.ConfigError), match=why) as raised:
        assemble.net_of(config.parse(tree(folder, method, view)))
    assert "\n" not in str(raised.value)


def test_a_run_without_is_the_run_that_it_was(folder: Path) -> None:
    for kind in ("lora", "filter", "full"):
        plain = config.parse(tree(folder, {"name": "fedavg"}, {"kind": kind}))
        empty = config.parse(tree(folder, {"name": "fedavg"}, {"kind": kind, "keep": []}))
        assert "keep" not in empty.to_toml().replace('name = "keep"', "").replace('keep = "last"', "")
        assert assemble.identity(plain) == assemble.identity(empty)
    parted = config.parse(tree(folder, {"name": "fedavg"}, {"kind": "lora", "keep": ["*.B"]}))
    assert config.parse(tomllib.loads(parted.to_toml())).model.view.keep == ("*.B",)
