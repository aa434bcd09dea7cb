"""FedCyBGD against the plain relay, its proxies, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, closed_data, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.compress.codecs.blocks import Blocks
from thinwire.core import Client, StaleVersion
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedcybgd import FedCyBGD, Proxy
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.shrink import Cut
from thinwire.model.views import Lora
from thinwire.runtime.store import VersionStore
from thinwire.train.local import Rule, train_locally
from thinwire.train.versions import decoded
from thinwire.train.weights import fill
from thinwire.wire import Illegal
from thinwire.wire.payload import Spec

LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 3, "batch_size": 4}
WHOLE: dict[str, Any] = {"drop": 0.0, "prune": 0.0, "around": "exact", "rounding": "nearest"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def net(folder: Path) -> Net:
    """Six layers with two groups of heads each."""
    return tiny_net(folder, num_hidden_layers=6)


def method(**fields: Any) -> FedCyBGD:
    return FedCyBGD(**({"blocks": 3, "common": 0, "spared": (1, 1), "drop": 0.45, "prune": 0.1} | LOCAL | fields))


def layer(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


def received(federation: Federation, client: int = 0, held: str | None = None) -> Proxy:
    server = federation.server(federation.round + 1, (client,))
    down = federation.method.broadcast(federation.state, server, client, held)
    assert isinstance(down, Proxy)
    return down


@pytest.mark.parametrize(("coded", "common"), [(True, 0), (False, 0), (True, 1), (False, 2)])
def test_without_compression_it_is_the_plain_relay(coded: bool, common: int, net: Net, tmp_path: Path) -> None:
    """Slow: all else frozen in the whole model, which goes from client to client."""
    federation = Federation(method(coded=coded, common=common, **WHOLE), net, tmp_path, rounds=4)
    weights = {name: net.base[name].clone() for name in net.names}
    for turn in range(4):
        id, own = turn % 3, {2 * (turn % 3), 2 * (turn % 3) + 1, *range(6 - 2 * common, 6)}
        fill(net, weights)
        block = [p for name, p in net.parameters() if layer(name) in own]
        for _, p in net.parameters():
            p.requires_grad_(any(p is mine for mine in block))
        key = federation.client(id, turn + 1).key
        batches = closed_data(net, federation.sizes[id], 100 + id).batches(key.fold("batches"), 4)
        train_locally(net.model, block, batches, Rule("adamw", 1e-2, 3, clip=1.0))
        weights = {name: p.detach().clone() for name, p in net.parameters()}
        for _, p in net.parameters():
            p.requires_grad_(True)
        at = federation.step((id,))
        assert at.visits[id].error is None
    for name, mine in federation.state.weights.items():
        assert torch.equal(mine, weights[name]), name


def test_in_full_with_one_client_it_is_fedavg(net: Net, tmp_path: Path) -> None:
    ours = Federation(method(variant="full", **WHOLE), net, tmp_path / "ours", rounds=2, sizes=(12,)).run()
    theirs = Federation(FedAvg(**LOCAL), net, tmp_path / "theirs", rounds=2, sizes=(12,)).run()
    for name, mine in ours.state.weights.items():
        assert torch.equal(mine, theirs.state.weights[name]), name


def test_a_cycle_visits_each_block_once_and_then_begins_anew(net: Net, tmp_path: Path) -> None:
    federation = Federation(method(extra=("embeddings", "head")), net, tmp_path, rounds=6, sizes=(12,))
    seen = []
    for _ in range(6):
        seen.append(received(federation).block)
        federation.step()
    assert seen == [0, 1, 2, 3, 4, 0]
    assert federation.state.updated == [0, 1]
    assert federation.state.ever == [0, 1, 2, 3, 4, 5]
    changed = {n for n, w in federation.state.weights.items() if not torch.equal(w, net.base[n])}
    assert changed == set(net.names)
    orders = {"descending": [2, 1, 0]}
    for order, blocks in orders.items():
        assert Federation(method(order=order), net, tmp_path / order, rounds=3).state.left == blocks
    drawn = [Federation(method(order="random"), net, tmp_path / f"{s}", seed=s).state.left for s in range(5)]
    assert all(sorted(left) == [0, 1, 2] for left in drawn)
    assert len({*map(tuple, drawn)}) > 1
    state = Federation(method(order="importance", importance="taylor"), net, tmp_path / "i").state
    means = [sum(state.scores[2 * b : 2 * b + 2]) for b in range(3)]
    assert state.left == sorted(range(3), key=lambda b: -means[b])


def test_a_client_that_does_not_answer_leaves_its_block_to_the_next(net: Net, tmp_path: Path) -> None:
    federation = Federation(
        method(), net, tmp_path, rounds=4, tamper=lambda client, frame: None if client == 1 else frame
    )
    for id in (0, 1, 2):
        federation.step((id,))
    assert federation.state.updated == [0, 1, 2, 3]
    assert federation.state.left == [2]


def test_the_last_blocks_train_in_every_turn(net: Net, tmp_path: Path) -> None:
    """They are whole in every proxy, count as updated from the first turn on, and clients at once share them."""
    federation = Federation(
        method(common=1, spared=(0, 0), extra=("embeddings", "head"), prune=0.5), net, tmp_path, rounds=6, sizes=(12,)
    )
    for turn in range(6):
        down, old = received(federation), federation.state
        cut = Cut.unpacked(down.cut, federation.method._blocks(net).layout)
        assert {4, 5} <= {*cut.layers} - {*cut.widths}
        federation.step()
        assert federation.history[-1].visits[0].error is None
        moved = {layer(n) for n, w in federation.state.weights.items() if not torch.equal(w, old.weights[n])}
        own = {0: {0, 1}, 1: {2, 3}, 2: set[int](), 3: {None}, 4: {None}, 5: {0, 1}}[turn]
        assert moved == own | {4, 5}
        assert {4, 5} <= {*federation.state.ever}
    assert federation.state.updated == [0, 1, 4, 5]
    both = Federation(method(common=1, variant="parallel", **WHOLE), net, tmp_path / "parallel").run(1)
    assert not [visit.error for at in both.history for visit in at.visits.values() if visit.error]
    assert len(both.state.left) == 3


def test_of_what_trains_in_every_turn_who_returns_is_sent_the_difference_to_what_it_had(
    net: Net, tmp_path: Path
) -> None:
    """With rough weights around the block, exact ones of its own are differences to the start model; not these."""
    fields = {"common": 1, "around": "8bit", "drop": 0.0, "prune": 0.0, "start": "shared"}
    federation = Federation(method(**fields), net, tmp_path, rounds=4, sizes=(12,)).run(3)
    down, at = received(federation, held=federation.held[0]), federation.method._blocks(net)
    known = federation.server(4, (0,)).versions.get(down.base)
    assert known is not None
    for number in (0, 4, 5):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        base, now = known[name] if number > 3 else net.base[name], federation.state.weights[name]
        assert torch.equal(decoded(down.changes[name], name, base, Spec.of(now)), now)
        assert name in at.names[down.block]
        assert (name in at.each) == (number > 3)


def test_clients_in_one_round_train_one_block_or_each_another(net: Net, tmp_path: Path) -> None:
    """The means and the damping, by their equations."""
    for variant, damping in (("relay", 1.0), ("parallel", 0.5)):
        federation = Federation(method(variant=variant, damping=damping, **WHOLE), net, tmp_path / variant)
        old, server = federation.state, federation.server(1, (0, 1, 2))
        ups = []
        for id in range(3):
            down = federation.method.broadcast(old, server, id, None)
            up = federation.method.client_update(down, federation.client(id, 1))
            ups.append((up, dict(federation.method._answered(old, up))))
        federation.step()
        if variant == "relay":
            assert {up.block for up, _ in ups} == {0}
            share = [size / sum(federation.sizes) for size in federation.sizes]
            for name in ups[0][1]:
                mean = sum(s * (new[name] - old.weights[name]) for s, (_, new) in zip(share, ups, strict=True))
                torch.testing.assert_close(federation.state.weights[name], old.weights[name] + mean, rtol=0, atol=1e-6)
        else:
            assert [up.block for up, _ in ups] == [0, 1, 2]
            for _, new in ups:
                for name, w in new.items():
                    expected = old.weights[name] + 0.5 * (w - old.weights[name])
                    torch.testing.assert_close(federation.state.weights[name], expected, rtol=0, atol=1e-6)
            assert len(federation.state.left) == 3  # a whole cycle in one round


def test_proxies_are_smaller_around_the_block(net: Net, tmp_path: Path) -> None:
    federation = Federation(method(drop=0.34, prune=0.5), net, tmp_path, rounds=6)
    layers, whole = [], sum(net.parameter(name).numel() for name in net.names)
    for turn in range(6):
        down = received(federation)
        assert sum(len(down.changes[name]) for name in down.changes) < 4 * whole
        kept, own = down.cut["layers"].tolist(), {2 * (turn % 3), 2 * (turn % 3) + 1}
        assert own | {0, 5} <= {*kept}  # never its own, the first or the last
        narrow = {int(name.split(".")[1]) for name in down.cut if name.startswith("heads")}
        assert narrow == set(federation.state.updated) - own
        assert all(len(down.cut[f"heads.{i}"]) == 1 and len(down.cut[f"channels.{i}"]) == 32 for i in narrow)
        layers.append(len(kept))
        at = federation.step((turn % 3,))
        assert at.visits[turn % 3].error is None
    # of six two may go: there are three that are neither its own, spared nor updated, then one, then none
    assert layers == [4, 5, 6, 4, 5, 6]


def test_who_returns_is_sent_less_and_trains_the_same(net: Net, tmp_path: Path) -> None:
    """At a rate of fine-tuning, in bfloat16: a difference to the proxy that it had."""
    federation = Federation(method(lr=1e-5, dtype="bfloat16"), net, tmp_path, rounds=8)
    federation.versions = VersionStore(tmp_path / "many", 9)
    for turn in range(3):
        federation.step((turn,))
    first, held = received(federation, 0), federation.held[0]
    again = received(federation, 0, held)
    assert (first.base, again.base) == (None, held)
    assert first.version == again.version
    assert len(wire.encode(again)) < len(wire.encode(first)) / 3
    ups = [federation.method.client_update(down, federation.client(0, 4)) for down in (first, again)]
    assert bytes(wire.encode(ups[0])) == bytes(wire.encode(ups[1]))
    client = federation.client(0, 4)
    client.versions = VersionStore(tmp_path / "lost", 2)
    with pytest.raises(StaleVersion):
        federation.method.client_update(again, client)
    shared = Federation(method(start="shared", dtype="bfloat16"), net, tmp_path / "shared")
    assert len(wire.encode(received(shared))) < len(wire.encode(first)) / 3  # a newcomer that has the start model


@pytest.mark.parametrize(("around", "bits"), [("8bit", 8), ("4bit", 4)])
@pytest.mark.parametrize("start", ["sent", "shared"])
def test_matrices_around_the_block_come_in_few_bits(
    start: str, around: str, bits: int, net: Net, tmp_path: Path
) -> None:
    """What the client then holds of them is what the code encodes, be it new or not, and in as many bytes or fewer."""
    code, sizes = Blocks(bits), dict[bool, list[int]]()
    for coded in (True, False):
        fields = {"around": around, "coded": coded, "start": start, "dtype": "bfloat16"}
        federation = Federation(method(lr=1e-4, **WHOLE | fields), net, tmp_path / str(coded), rounds=5)
        federation.versions = VersionStore(tmp_path / f"{coded}-many", 9)
        for turn in range(4):
            federation.step((turn % 3,))
        first, again = received(federation, 1), received(federation, 1, federation.held[1])
        assert (first.block, first.version) == (1, again.version)
        client = federation.client(1, 5)
        ups = [federation.method.client_update(down, client) for down in (first, again)]
        assert bytes(wire.encode(ups[0])) == bytes(wire.encode(ups[1]))
        held = client.versions.get(first.version)
        assert held is not None
        for name, weights in federation.state.weights.items():
            expected = weights
            if layer(name) not in (2, 3) and weights.dim() == 2:
                rough = code.decode(code.encode(weights.float(), 0), weights.shape, 0)
                expected = rough.bfloat16()
                assert not torch.equal(expected, weights)
            assert torch.equal(held[name], expected), name
        sizes[coded] = [sum(t.nbytes for t in down.changes.values()) for down in (first, again)]
    state = federation.state.weights
    whole = sum(
        2 * w.numel() if w.dim() < 2 or layer(name) in (2, 3) else code.size(w.numel()) for name, w in state.items()
    )
    assert sizes[False] == [whole, whole]
    assert sizes[True][0] < whole
    assert sizes[True][1] < (sizes[True][0] + 1 if start == "shared" else whole / 3)


@pytest.mark.parametrize("coded", [True, False])
def test_few_bits_that_are_none_are_refused(coded: bool, net: Net, tmp_path: Path) -> None:
    federation = Federation(method(coded=coded, **WHOLE | {"around": "8bit"}), net, tmp_path)
    down, name = received(federation), "model.layers.5.mlp.up_proj.weight"
    for wrong in (down.changes[name][:-1], down.changes[name].float(), torch.full_like(down.changes[name], 255)):
        with pytest.raises(Illegal, match=name):
            federation.method.client_update(
                replace(down, changes={**down.changes, name: wrong}), federation.client(0, 1)
            )


def test_of_narrowed_layers_the_same_stays_in_each_cycle(net: Net, tmp_path: Path) -> None:
    """So that they, too, are sent as differences, be it to what was whole the last time."""
    federation = Federation(method(lr=1e-5, dtype="bfloat16", drop=0.0, prune=0.5), net, tmp_path, rounds=9)
    federation.versions = VersionStore(tmp_path / "many", 9)
    for turn in range(5):
        federation.step((turn % 3,))
    narrow = [name for name in received(federation).cut if "." in name]
    assert len(narrow) == 8
    for client in (2, 0):  # in the third and the fourth turn before: those layers were narrow, and whole
        again, first = received(federation, client, federation.held[client]), received(federation, client)
        for name, change in again.changes.items():
            if f"heads.{layer(name)}" in narrow and ".mlp." in name:
                assert len(change) < len(first.changes[name]) / 3, (client, name)


def test_a_client_without_the_model_in_memory_answers_the_same(folder: Path, net: Net, tmp_path: Path) -> None:
    federation = Federation(method(drop=0.34, prune=0.5), net, tmp_path).run(2)
    down, client = received(federation), federation.client(0, 3)
    hollow = Net.open(str(folder), hollow=True)
    other = Client(0, hollow, client.data, client.key, {}, client.versions)
    ups = [federation.method.client_update(down, c) for c in (client, other)]
    assert bytes(wire.encode(ups[0])) == bytes(wire.encode(ups[1]))
    assert all(p.is_meta for p in hollow.model.parameters())


def test_a_server_that_checks_takes_no_step_that_harms(net: Net, tmp_path: Path) -> None:
    for lr, step in ((3e-3, 1.0), (30.0, 0.0)):
        checking = method(lr=lr, choose_step=True, **WHOLE)
        federation = Federation(checking, net, tmp_path / str(lr), sizes=(12,), public=closed_data(net, 16, 7))
        before = federation.state
        federation.step()
        assert federation.metrics["step"] == step
        same = all(torch.equal(w, before.weights[name]) for name, w in federation.state.weights.items())
        assert same == (step == 0.0)
        assert federation.state.left == [1, 2]


def test_of_updated_layers_a_share_is_shown(net: Net, tmp_path: Path) -> None:
    """The published stand-in: the others are sent as they were at the start."""
    for shown, count in ((0.0, 4), (0.5, 2), (1.0, 0)):
        federation = Federation(method(shown=shown, coded=False, **WHOLE), net, tmp_path / str(shown)).run(2)
        down = received(federation)
        names = [name for name in net.names if layer(name) in {0, 1, 2, 3} and name.endswith("q_proj.weight")]
        old = [name for name in names if torch.equal(down.changes[name], net.base[name])]
        assert len(old) == count
    down = received(Federation(method(shown=0.0, coded=False, **WHOLE), net, tmp_path / "own").run(3))
    assert down.block == 0


def test_behind_a_veil_a_client_never_sees_some_layers_but_as_its_block(net: Net, tmp_path: Path) -> None:
    """Two clients take turns over three blocks, so that each trains all of them; for three cycles."""
    federation = Federation(method(shown=0.5, veiled=True, coded=False, **WHOLE), net, tmp_path, rounds=9, seed=1)
    seen: list[set[int]] = [set(), set()]
    for turn in range(9):
        client = turn % 2
        down, own = received(federation, client), {2 * (turn % 3), 2 * (turn % 3) + 1}
        for name in net.names:
            number = layer(name)
            if number is not None and number not in own and name.endswith("q_proj.weight"):
                now, old = federation.state.weights[name], net.base[name]
                if torch.equal(down.changes[name], now) and not torch.equal(now, old):
                    seen[client].add(number)
        federation.step((client,))
    assert [len(layers) for layers in seen] == [3, 3]
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"blocks": 7}, "method.blocks: 6 layers cannot make 7 blocks"),
        ({"common": 4}, "method.common: there are 3 blocks, not 4"),
        ({"drop": 0.9}, "method.drop: 5 of 6 layers are more than the 3 that can be dropped: the first 1"),
        ({"layers": "model.nothing"}, "LlamaForCausalLM has no list of layers of one class at 'model.nothing'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(fields: dict[str, Any], line: str, net: Net) -> None:
    with pytest.raises(ModelError, match=line):
        method(**fields).fits(net)


def test_to_choose_a_step_takes_rows_at_the_server(net: Net, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"method\.choose_step: needs rows at the server, data\.public"):
        Federation(method(choose_step=True), net, tmp_path)


def test_adapters_are_refused_before_anything_runs(folder: Path, net: Net) -> None:
    view = Lora(rank=2, alpha=4.0, targets=("q_proj",))
    with pytest.raises(ModelError, match=r"model\.lora: fedcybgd"):
        method().fits(Net.open(str(folder), view=view))


def test_a_proxy_that_is_none_is_refused(net: Net, tmp_path: Path) -> None:
    federation = Federation(method(drop=0.34, prune=0.5), net, tmp_path).run(2)
    down, half = received(federation), torch.tensor([0], dtype=torch.int32)
    bad = {
        "there is no block 9": replace(down, block=9),
        "leaves block 2 not whole": replace(down, cut=down.cut | {"heads.4": half, "channels.4": half}),
        "this client's": replace(down, model="another"),
        "the names of the changes": replace(down, cut={"layers": torch.tensor([0, 4, 5], dtype=torch.int32)}),
        "do not make the version": replace(down, version="0" * 32),
        "layer 99 is kept of 6": replace(down, cut={"layers": torch.tensor([0, 4, 5, 99], dtype=torch.int32)}),
    }
    for line, wrong in bad.items():
        with pytest.raises(Illegal, match=line):
            federation.method.client_update(wrong, federation.client(0, 3))


def test_a_version_that_is_lost_during_the_visit_is_reported(net: Net, tmp_path: Path) -> None:
    federation = Federation(method(), net, tmp_path)
    client = federation.client(0, 1)

    class Losing(VersionStore):
        def get(self, version: str) -> None:
            return None

    client.versions = Losing(tmp_path / "losing")
    with pytest.raises(Illegal, match="was lost during the visit"):
        federation.method.client_update(received(federation), client)


@pytest.mark.parametrize("coded", [True, False])
def test_a_reply_that_is_none_is_refused(coded: bool, net: Net, tmp_path: Path) -> None:
    federation = Federation(method(coded=coded), net, tmp_path)
    up = federation.method.client_update(received(federation), federation.client(0, 1))
    federation.method.check(federation.state, 0, up)
    name = next(iter(up.changes))
    other: dict[str, Tensor] = dict(up.changes)
    other[name] = other[name][:-1]
    for line, wrong in {
        "block 7 is not one": replace(up, block=7),
        "not those of block 1": replace(up, block=1),
        name: replace(up, changes=other),
    }.items():
        with pytest.raises(Illegal, match=line):
            federation.method.check(federation.state, 0, wrong)
