"""FedOBD against its rule the slow way: which blocks travel and their bytes; what an unsent block counts as; FedAvg."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from federation import Federation, tiny_net

from thinwire import wire
from thinwire.aggregate.server_step import Momentum
from thinwire.compress.codecs.nnadq import HEAD, Nnadq
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedobd import FedOBD, Kept, kept
from thinwire.model.blocks import modules_of
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train.weights import Trained

SET: dict[str, Any] = {"lr": 3e-3, "steps": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def block_of(name: str) -> str:
    """As the model's own names have it: a layer, or the module."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else ".".join(parts[:-1])


def replies(method: FedOBD, federation: Federation, round: int = 1) -> dict[int, Kept]:
    """What each client answers in a round, as it comes out of its frame."""
    server = federation.server(round, range(len(federation.sizes)))
    down = method.broadcast(federation.state, server, 0, None)
    return {
        id: wire.decode(Kept, wire.encode(method.client_update(down, federation.client(id, round))))
        for id in range(len(federation.sizes))
    }


@pytest.mark.parametrize("codec", ["nnadq", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.5, 0.7])
def test_what_travels_is_what_the_rule_keeps_to_the_byte(dropout: float, codec: Any, net: Net, tmp_path: Path) -> None:
    """Against FedAvg's own training of the same client, its weights taken apart by the equation."""
    method = FedOBD(**SET, dropout=dropout, codec=codec)
    federation = Federation(method, net, tmp_path)
    plain = Federation(FedAvg(**SET), net, tmp_path / "plain")
    up = replies(method, federation)[1]
    down = plain.method.broadcast(plain.state, plain.server(1, ()), 1, None)
    trained = plain.method.client_update(down, plain.client(1, 1))
    blocks: dict[str, list[str]] = {}
    for name in net.names:
        blocks.setdefault(block_of(name), []).append(name)
    size = {block: sum(net.base[n].numel() for n in names) for block, names in blocks.items()}
    moved = {
        block: math.sqrt(sum(float((trained.weights[n].double() - net.base[n].double()).square().sum()) for n in names))
        / size[block]
        for block, names in blocks.items()
    }
    held, wanted = 0, set[str]()
    for block in sorted(moved, key=moved.__getitem__, reverse=True):
        if held + size[block] <= (1 - dropout) * sum(size.values()):
            held += size[block]
            wanted |= {*blocks[block]}
    assert set(up.weights) == wanted
    assert 0 < held <= (1 - dropout) * sum(size.values())
    if dropout:
        assert wanted != set(net.names)
    for name, tensor in up.weights.items():
        if codec == "none":
            assert torch.equal(tensor, trained.weights[name])
            continue
        change = trained.weights[name] - net.base[name]
        middle = (float(change.max()) + float(change.min())) / 2
        c = float((change.double() - middle).abs().max())
        s = max(1, math.floor(math.sqrt(32 * c * math.log(4) / 1e-4)))
        bits = math.ceil(math.log2(s + 1)) + 1
        assert tensor.numel() == HEAD + -(-change.numel() // 8) * bits  # all sides here are multiples of 8
        found = Nnadq(1e-4).decode(to_bytes(tensor), change.shape, 0)
        assert float((found - change).abs().max()) <= c / (2 * s) * 1.001


@pytest.mark.parametrize("unsent", ["cached", "senders"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_dropout_in_32_bits_it_is_fedavg_bit_for_bit(dtype: str, unsent: Any, tmp_path: Path) -> None:
    net = tiny_net(tmp_path / "model", dtype)
    step = {"server_step": Momentum(momentum=0.5)}
    method = FedOBD(**SET, **step, dropout=0, codec="none", unsent=unsent)
    mine = Federation(method, net, tmp_path / "a", rounds=3).run()
    theirs = Federation(FedAvg(**SET, **step), net, tmp_path / "b", rounds=3).run()
    one, other = (bytes(wire.encode(Trained(run.state.weights, 0, 0.0, 0))) for run in (mine, theirs))
    assert one == other
    dropped = Federation(FedOBD(**SET, **step, codec="none", unsent=unsent), net, tmp_path / "c", rounds=3).run()
    assert any(not torch.equal(dropped.state.weights[n], t) for n, t in theirs.state.weights.items())


@pytest.mark.parametrize("codec", ["nnadq", "none"])
@pytest.mark.parametrize("unsent", ["cached", "senders"])
def test_a_block_that_was_not_sent_counts_as_the_server_has_it_or_not_at_all(
    unsent: Any, codec: Any, net: Net, tmp_path: Path
) -> None:
    method = FedOBD(**SET, dropout=0.4, unsent=unsent, codec=codec)
    federation = Federation(method, net, tmp_path)
    before = {name: t.double() for name, t in federation.state.weights.items()}
    ups = replies(method, federation)
    # clients here agree on the blocks: so one of them keeps another one, as if its rows were others
    own = next(own for own in modules_of(net.names) if own[0] not in ups[0].weights)
    other = {n: before[n].float() + 0.5 for n in own}
    if codec == "nnadq":
        other = {n: to_tensor(Nnadq(1e-4).encode(t - before[n].float(), 0)) for n, t in other.items()}
    ups[1] = dataclasses.replace(ups[1], weights=other)
    method.check(federation.state, 1, ups[1])
    state, _ = method.aggregate(federation.state, federation.server(1, (0, 1, 2)), iter(ups.items()))
    total = sum(up.examples for up in ups.values())
    for name, old in before.items():
        change, share = torch.zeros_like(old), 0
        for up in ups.values():
            if name in up.weights:
                code, share = up.weights[name], share + up.examples
                found = Nnadq(1e-4).decode(to_bytes(code), old.shape, 0) if codec == "nnadq" else code.double() - old
                change += up.examples * found.double()
        wanted = old + change / (total if unsent == "cached" else max(share, 1))
        torch.testing.assert_close(state.weights[name].double(), wanted, rtol=0, atol=1e-6)
    assert set(ups[0].weights) != set(ups[1].weights)


def test_greedy_passes_over_what_has_no_room() -> None:
    assert kept([5, 4, 3, 2, 1], [40, 70, 20, 30, 10], 100) == [0, 2, 3, 4]
    assert kept([1, 1, 1], [50, 50, 50], 100) == [0, 1]  # alike: the first ones
    assert kept([1.0], [8], 7.9) == []


def test_the_second_stage_has_all_blocks_and_fewer_steps(net: Net, tmp_path: Path) -> None:
    method = FedOBD(lr=1e-3, steps=10, batch_size=4, dropout=0.5, stage_one=2)
    federation = Federation(method, net, tmp_path, rounds=4)
    assert [federation.method.work(round).steps for round in (1, 2, 3, 4)] == [10, 10, 2, 2]
    shares, bytes_up = [], []
    for _ in range(4):
        at = federation.step()
        shares.append(federation.metrics["kept"])
        bytes_up.append(at.visits[0].bytes_up)
    assert max(shares[:2]) <= 0.5
    assert shares[2:] == [1, 1]
    assert federation.state.stage == 2
    assert FedOBD(steps=3).work(101).steps == 1
    assert FedOBD(steps=3, stage_two_steps=7).work(101).steps == 7
    # what a stage allows is checked: all blocks are too many for stage one
    up = replies(method, federation, 4)[0]
    first = dataclasses.replace(federation.state, stage=1)
    with pytest.raises(wire.Illegal, match=r"more weights than a dropout of 0\.5 leaves"):
        method.check(first, 0, up)


def test_a_lost_round_puts_the_second_stage_off_at_both_ends(net: Net, tmp_path: Path) -> None:
    method = FedOBD(**SET, dropout=0.5, stage_one=1)
    federation = Federation(method, net, tmp_path, rounds=3, tamper=lambda client, frame: None)
    federation.step()
    federation.tamper = None
    at = federation.step()
    assert all(visit.error is None for visit in at.visits.values())
    assert federation.metrics["kept"] <= 0.5
    federation.step()
    assert federation.metrics["kept"] == 1


def test_what_the_paper_sends_down_and_what_is_sent_of_the_start(net: Net, tmp_path: Path) -> None:
    """The error of each, against the server's own weights, is half a level of what travels."""
    starts: dict[Literal["change", "weights"], float] = {"change": 1.0, "weights": 0.0}
    for down, start in starts.items():
        method = FedOBD(**SET, down=down)
        federation = Federation(method, net, tmp_path / down, rounds=1).run()
        method.materialise(federation.state, net)
        for name, parameter in net.parameters():
            exact = federation.state.weights[name].double()
            of = exact - start * net.base[name].double()
            c = float((of - (of.max() + of.min()) / 2).abs().max())
            most = c / (2 * Nnadq(1e-4).levels(c))
            assert float((parameter.detach().double() - exact).abs().max()) <= most * 1.001 + 1e-7
    first = Federation(FedOBD(**SET), net, tmp_path / "first", rounds=1).step()
    assert first.visits[0].bytes_down < 70 * len(net.names)  # nothing has changed yet


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: {**w, "extra": torch.zeros(8, dtype=torch.uint8)}, "whole blocks"),
        (lambda w: {n: t for n, t in w.items() if "down_proj" not in n}, "whole blocks"),
        (lambda w: {n: t for n, t in w.items() if "q_proj" not in n}, "whole blocks"),
        (lambda w: {}, "whole blocks"),
        (lambda w: {n: t[:-1] for n, t in w.items()}, "bytes"),
        (lambda w: {n: t.float() for n, t in w.items()}, "not bytes"),
        (lambda w: {n: to_tensor(b"\0\0\xc8\x47" + bytes(4)) for n in w}, "beyond 60000"),
    ],
)
def test_what_a_client_may_not_answer(change: Any, reason: str, net: Net, tmp_path: Path) -> None:
    method = FedOBD(**SET)
    federation = Federation(method, net, tmp_path)
    good = replies(method, federation)[0]
    method.check(federation.state, 0, good)
    with pytest.raises(wire.Illegal, match=reason):
        method.check(federation.state, 0, dataclasses.replace(good, weights=change(dict(good.weights))))


def test_a_dropout_that_leaves_no_block_is_refused(net: Net) -> None:
    FedOBD(dropout=0.3).fits(net)
    with pytest.raises(
        ModelError, match=r"^method\.dropout: 0\.9999 leaves 2 of 26,880 weights, and the smallest"
    ) as error:
        FedOBD(dropout=0.9999).fits(net)
    assert "\n" not in str(error.value)
