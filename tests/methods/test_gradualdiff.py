"""GradualDiff-Fed: equal to FedAvg, the same bits at all peers whatever they missed, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.gradualdiff import START, GradualDiff
from thinwire.model.net import Net
from thinwire.runtime.store import VersionStore
from thinwire.train.versions import layout
from thinwire.wire.payload import specs_of

LOCAL: dict[str, Any] = {"lr": 3e-3, "steps": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def net(folder: Path) -> Net:
    return tiny_net(folder, "bfloat16")


def method(**fields: Any) -> GradualDiff:
    return GradualDiff(**(LOCAL | fields))


def down_of(federation: Federation, client: int, held: str | None) -> Any:
    """What the client would be sent after the last round, over the wire."""
    server = federation.server(federation.round, (client,))
    down = federation.method.broadcast(federation.state, server, client, held)
    return wire.decode(federation.method.Down, wire.encode(down))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize(("optimiser", "share"), [("sgd", 1.0), ("adamw", 0.99)])
def test_in_exact_arithmetic_it_is_fedavg(
    optimiser: str, share: float, weighting: str, folder: Path, tmp_path: Path
) -> None:
    """In float32, whose roundings are small: the same weights as FedAvg's, to a few of them.

    AdamW divides by the gradient's size, and so makes much of the rounding of a gradient near zero: a few elements.
    """
    net, fields = tiny_net(folder), {"weighting": weighting, "optimiser": optimiser}
    fields |= {"lr": 0.5} if optimiser == "sgd" else {}
    ours = Federation(method(**fields), net, tmp_path / "ours", rounds=2).run()
    theirs = Federation(FedAvg(**{**LOCAL, **fields}), net, tmp_path / "theirs", rounds=2).run()
    for name, weights in ours.state.weights.items():
        known = theirs.state.weights[name]
        moved = (known - net.base[name]).abs().max()
        near = (weights - known).abs() <= 1e-4 * moved + 5e-7  # some units in the last place of 1.0
        assert near.float().mean() >= share, name
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4)


def test_one_client_nearest_is_fedavg_bit_for_bit(net: Net, tmp_path: Path) -> None:
    ours = Federation(method(rounding="nearest"), net, tmp_path / "ours", rounds=3, sizes=(12,)).run()
    theirs = Federation(FedAvg(**LOCAL), net, tmp_path / "theirs", rounds=3, sizes=(12,)).run()
    for name, weights in ours.state.weights.items():
        assert torch.equal(weights, theirs.state.weights[name]), name


@pytest.mark.parametrize("codec", ["lossless", "eden"])
def test_who_joins_late_and_who_missed_rounds_hold_the_same_bits(codec: str, net: Net, tmp_path: Path) -> None:
    federation = Federation(method(codec=codec, bits=2), net, tmp_path, rounds=5)
    federation.versions, start = VersionStore(tmp_path / "versions", 5), federation.state.version
    held = []
    for _ in range(5):
        federation.step()
        held.append(federation.state.version)
    # round 5 sent to held[3], round 2 held[0]; the store keeps five versions
    cases = {"newcomer": None, "missed none": held[3], "missed three": held[0], "missed too many": start}
    bases = cases | {"missed too many": None}
    federation.method.materialise(federation.state, net)
    mine = net.state_sha256()
    for name, version in cases.items():
        down = down_of(federation, 0, version)
        assert down.base == bases[name], name
        net.reset()
        net.forget()
        client = federation.client(0, 6)
        client.held = version
        federation.method.receive(down, client)
        assert net.state_sha256() == mine, name
        assert client.held == federation.state.version
    # who has it is sent nothing, even by a server whose store has lost it
    for file in (tmp_path / "versions").glob("*.safetensors"):
        file.unlink()
    down = down_of(federation, 0, federation.state.version)
    assert not down.changes
    assert down.base == down.version


def test_a_client_that_lost_its_version_is_asked_once_more(net: Net, tmp_path: Path) -> None:
    federation = Federation(method(), net, tmp_path, rounds=3).run(2)
    down = down_of(federation, 0, federation.held[0])
    assert down.base == federation.held[0]
    for file in (tmp_path / "versions").glob("*.safetensors"):
        file.unlink()
    net.forget()
    at = federation.step()
    assert all(visit.error is None for visit in at.visits.values())
    first, second = federation.history[0].visits[0], at.visits[0]
    assert second.bytes_down > first.bytes_down * 0.9  # the whole model again


def test_a_float32_model_may_train_on_bfloat16_weights(folder: Path, tmp_path: Path) -> None:
    """What peers hold is bfloat16; each trains and scores in float32."""
    net = tiny_net(folder)
    federation = Federation(method(dtype="bfloat16", start="shared"), net, tmp_path, rounds=3).run()
    assert {tensor.dtype for tensor in federation.state.weights.values()} == {torch.bfloat16}
    federation.method.materialise(federation.state, net)
    mine = net.state_sha256()
    for held in (None, federation.held[0]):
        net.reset()
        net.forget()
        federation.method.receive(down_of(federation, 0, held), federation.client(0, 4))
        assert net.state_sha256() == mine
    assert all(parameter.dtype == torch.float32 for _, parameter in net.parameters())


def test_a_shared_start_is_sent_as_a_difference(net: Net, tmp_path: Path) -> None:
    shared = Federation(method(start="shared"), net, tmp_path / "shared", rounds=2).run()
    sent = Federation(method(), net, tmp_path / "sent", rounds=2).run()
    assert shared.state.version == sent.state.version
    down = down_of(shared, 0, None)
    assert down.base == START
    assert len(wire.encode(down)) < len(wire.encode(down_of(sent, 0, None)))
    assert shared.history[0].visits[0].bytes_down < 5_000 < 20_000 < sent.history[0].visits[0].bytes_down


@pytest.mark.parametrize(
    "fields", [{"rounding": "residue"}, {"codec": "blocks", "bits": 1}, {"codec": "topk", "gate": True}]
)
def test_what_was_not_sent_is_sent_later(fields: dict[str, Any], net: Net, tmp_path: Path) -> None:
    """Error feedback: what all rounds sent together with what is left is what all rounds wanted to send."""
    sent: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}

    class Watched(GradualDiff):
        def client_update(self, down: Any, client: Any) -> Any:
            before = {name: client.memory[name].clone() for name in client.memory}
            up = super().client_update(down, client)
            for name, change in self._differences(federation.state, up).items():
                left = client.memory[name]
                sent[name] = sent.get(name, 0) + change
                wanted[name] = wanted.get(name, 0) + change + left - before.get(name, 0)
            return up

    federation = Federation(Watched(**(LOCAL | fields)), net, tmp_path, rounds=3, sizes=(12,))
    federation.run()
    memory = federation.client(0, 4).memory
    assert memory
    for name, whole in wanted.items():
        torch.testing.assert_close(sent[name] + memory[name], whole, rtol=0, atol=1e-5)
        assert memory[name].abs().max() > 0 or not whole.abs().max()


def test_another_model_or_dtype_is_refused_with_both_named(net: Net, folder: Path, tmp_path: Path) -> None:
    federation = Federation(method(), net, tmp_path, rounds=1)
    down = down_of(federation, 0, None)
    other = tiny_net(tmp_path / "other", "bfloat16", hidden_size=64)
    for strange, what in ((tiny_net(folder), "float32"), (other, "bfloat16")):
        client = dataclasses.replace(federation.client(0, 1), net=strange)
        with pytest.raises(wire.Illegal) as caught:
            federation.method.receive(down, client)
        assert layout(specs_of(federation.state.weights)) in str(caught.value)
        assert f"this client's {sum(p.numel() for _, p in strange.parameters()):,} {what}" in str(caught.value)


def test_changes_that_do_not_make_the_version_are_refused(net: Net, tmp_path: Path) -> None:
    federation = Federation(method(), net, tmp_path, rounds=3).run()
    down = down_of(federation, 0, None)
    other = dict(down.changes) | {"model.norm.weight": down.changes["model.layers.0.input_layernorm.weight"]}
    first = next(iter(down.changes))
    for wrong in (
        dataclasses.replace(down, version="0" * 32),
        dataclasses.replace(down, changes=other),
        dataclasses.replace(down, changes=dict(down.changes) | {first: down.changes[first][:-5]}),
        dataclasses.replace(down, changes=dict(down.changes) | {first: down.changes[first].float()}),
        dataclasses.replace(down, changes={first: down.changes[first]}),
        dataclasses.replace(down, changes={}),
    ):
        net.forget()
        client = federation.client(0, 4)
        with pytest.raises(wire.WireError):
            federation.method.receive(wrong, client)
        assert client.held == federation.held[0]  # what it held before it holds still
    up = federation.method.client_update(down, federation.client(0, 4))
    with pytest.raises(wire.Illegal, match="a difference to the version 0000"):
        federation.method.check(federation.state, 0, dataclasses.replace(up, base="0" * 32))


@pytest.mark.parametrize("codec", ["lossless", "blocks"])
def test_an_update_that_is_no_number_is_refused_and_the_round_goes_on(codec: str, net: Net, tmp_path: Path) -> None:
    federation = Federation(method(codec=codec, rounding="residue"), net, tmp_path, rounds=2)
    memory = federation.memories.of(1, 0)
    memory["model.norm.weight"] = torch.full((32,), math.inf)
    memory.commit()
    at = federation.step()
    assert "is not finite" in str(at.visits[1].error)
    assert at.visits[0].error is None
    assert all(torch.isfinite(tensor).all() for tensor in federation.state.weights.values())


def test_the_server_sends_two_clients_mean_whole_at_twice_their_rank(folder: Path, tmp_path: Path) -> None:
    net, lost = tiny_net(folder), {}
    for rank in (None, 1, 2):
        fields = {"codec": "lowrank", "rank": 1, "bits": 8, "down_rank": rank}
        federation = Federation(method(**fields), net, tmp_path / str(rank), rounds=1, sizes=(12, 8)).run()
        weights, residue = federation.state.weights, federation.state.residue
        assert residue is not None
        matrix = next(name for name in weights if "q_proj" in name)
        lost[rank] = float(residue[matrix].norm() / (weights[matrix] - net.base[matrix]).norm())
        sent_size = down_of(federation, 0, federation.held[0]).changes[matrix].numel()
        assert sent_size == federation.method.code(down=True).size(weights[matrix].shape)
    assert lost[None] == lost[1] > 0.1, lost
    assert lost[2] < 0.02, lost


def test_unknown_bits_are_refused() -> None:
    for fields in ({"codec": "blocks", "bits": 9}, {"codec": "eden", "bits": 0.7}, {"codec": "topk", "bits": 2.5}):
        with pytest.raises(ValueError, match="bits"):
            method(**fields)
