"""Rounds under masks: the sum and nothing but, whoever leaves and whenever; what neither end will do."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net

pytest.importorskip("cryptography", reason="comes with: pip install 'thinwire[secure]'")
pytest.importorskip("Crypto", reason="comes with: pip install 'thinwire[secure]'")

from secured import Quick, Secured

from thinwire import wire
from thinwire.aggregate.robust import Median
from thinwire.errors import ConfigError, RunError
from thinwire.evaluate.loss import mean_loss
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedzo import FedZO
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.methods.onebit import OneBit
from thinwire.model.net import Net
from thinwire.privacy.secure import Secure
from thinwire.runtime.sums import linear_of
from thinwire.wire import Frame

KINDS = ("Keys", "Shares", "Masked", "Unmasked")
SEEDS: dict[str, Any] = {"seeds": 64, "lr": 2e-4, "eps": 1e-3, "steps": 6, "batch_size": 4, "shared": True}
ROWS = {
    "fedavg": FedAvg(lr=3e-3, steps=2, batch_size=4),
    "fedavg-uniform": FedAvg(lr=3e-3, steps=2, batch_size=4, weighting="uniform", server_step={"kind": "adam"}),
    "fedkseed": FedKSeed(**SEEDS),
    "fedkseed-decay": FedKSeed(**SEEDS, weight_decay=0.3, queries=2, scalars="int8", weighting="uniform"),
    "fedkseed-paper": FedKSeed(**SEEDS, wire="paper"),
    "onebit": OneBit(lr=1e-2, steps=2, batch_size=4, weighting="uniform"),
    "onebit-adam": OneBit(lr=1e-2, steps=2, batch_size=4, weighting="uniform", server_step={"kind": "adam"}),
    "fedzo": FedZO(lr=2e-4, eps=1e-3, steps=2, batch_size=4),
}

FAST = Quick(**SEEDS)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def state_bytes(state: Any) -> bytes:
    return bytes(wire.encode(state))


def losing(*lost: tuple[int, str]) -> Any:
    """Replies of these clients and kinds do not come."""
    return lambda client, frame: None if (client, frame.header().kind) in lost else frame


@pytest.mark.parametrize("row", ROWS)
def test_a_round_under_masks_is_the_plain_sum_to_the_bit(row: str, net: Net, tmp_path: Path) -> None:
    both = Secured(ROWS[row], net, tmp_path)
    for _ in range(2):
        at = both.masked.step()
        assert [visit.error for visit in at.visits.values()] == [None] * 4
        assert state_bytes(both.masked.state) == state_bytes(both.plain_round(range(4)))
    assert state_bytes(both.masked.state) != state_bytes(ROWS[row].init(both.open.server(0, ())))
    assert both.masked.held == both.open.held


@pytest.mark.parametrize("row", [row for row in ROWS if "onebit" not in row])
def test_and_what_a_plain_round_comes_to_but_for_its_rounding(row: str, net: Net, tmp_path: Path) -> None:
    masked = Secured(ROWS[row], net, tmp_path, Secure(examples=16, bits=32)).masked
    plain = Federation(ROWS[row], net, tmp_path / "plain", sizes=masked.sizes)
    masked.step()
    plain.step()
    weights = []
    for federation in (masked, plain):
        federation.method.materialise(federation.state, net)
        weights.append(torch.cat([p.detach().flatten() for _, p in net.parameters()]).clone())
    start = torch.cat([net.base[name].flatten() for name in net.names])
    assert (weights[0] - weights[1]).norm() < 1e-3 * (weights[1] - start).norm()
    assert masked.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-4)
    assert masked.metrics["cut"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", range(4))
def test_any_one_client_may_leave_at_any_step(kind: str, who: int, net: Net, tmp_path: Path) -> None:
    both = Secured(FAST, net, tmp_path)
    both.masked.tamper = losing((who, kind))
    at = both.masked.step()
    there = [client for client in range(4) if client != who or kind == "Unmasked"]
    trained = range(4) if kind in ("Masked", "Unmasked") else there
    # fewer clients are asked about, so the modulus is theirs; the sum is not another one
    assert state_bytes(both.masked.state) == state_bytes(both.plain_round(there, trained))
    assert [client for client, visit in at.visits.items() if visit.error] == [who]


def test_any_tolerated_set_may_leave_and_a_larger_one_ends_the_round(net: Net, tmp_path: Path) -> None:
    """Of five whose secrets any three recover: all sets of who leaves with the masked reply, or the shares."""
    secure, sizes = Secure(examples=16, threshold=0.51), (4, 5, 6, 7, 8)
    for number, gone in enumerate(chosen for many in (1, 2, 3) for chosen in combinations(range(5), many)):
        for kind in ("Masked", "Unmasked"):
            both = Secured(FAST, net, tmp_path / f"{number}{kind}", secure, sizes)
            before = state_bytes(both.masked.state)
            both.masked.tamper = losing(*((client, kind) for client in gone))
            if len(gone) > 2:
                with pytest.raises(
                    RunError, match=r"^round 1: the secure sum fails: .*the checkpoint of round 0 stays$"
                ):
                    both.masked.step()
                assert state_bytes(both.masked.state) == before
                continue
            both.masked.step()
            there = [client for client in range(5) if client not in gone or kind == "Unmasked"]
            assert state_bytes(both.masked.state) == state_bytes(both.plain_round(there, range(5)))


def test_clients_that_share_masks_with_some_come_to_the_same_sum(net: Net, tmp_path: Path) -> None:
    """Nine on a circle with six neighbours each; one leaves at each step."""
    both = Secured(FAST, net, tmp_path, Secure(examples=16, neighbours=6, threshold=0.51), (4, 5, 6, 7, 8, 4, 5, 6, 7))
    both.masked.tamper = losing((0, "Keys"), (2, "Shares"), (4, "Masked"), (6, "Unmasked"))
    both.masked.step()
    there = [1, 3, 5, 6, 7, 8]
    assert state_bytes(both.masked.state) == state_bytes(both.plain_round(there, [*there, 4]))


def test_fewer_than_the_smallest_sum_ends_the_round_in_a_line(net: Net, tmp_path: Path) -> None:
    both = Secured(FAST, net, tmp_path, Secure(examples=16, minimum=4))
    both.masked.tamper = losing((1, "Masked"))
    with pytest.raises(
        RunError, match=r"^round 1: the secure sum fails: 3 of 4 clients remain, 4 must; client 1: "
    ) as caught:
        both.masked.step()
    assert "\n" not in str(caught.value)


def test_a_round_that_has_died_is_repeated_with_fresh_keys(net: Net, tmp_path: Path) -> None:
    both, seen = Secured(FAST, net, tmp_path), list[Frame]()
    both.masked.watch = seen.append
    both.masked.tamper = losing((0, "Unmasked"), (1, "Unmasked"))
    with pytest.raises(RunError, match="2 shares of client 0's secret came, 3 must"):
        both.masked.step()
    both.masked.round, both.masked.tamper = 0, None
    both.masked.step()
    assert state_bytes(both.masked.state) == state_bytes(both.plain_round(range(4)))
    keys = {wire.decode(wire_class("Keys"), frame).mask for frame in seen if frame.header().kind == "Keys"}
    assert len(keys) == 8


def test_the_repeated_round_is_not_unmasked_for_others(net: Net, tmp_path: Path) -> None:
    """Its sum and the first one's would differ by one client's reply."""
    both = Secured(FAST, net, tmp_path)
    both.masked.step()
    both.masked.round, both.masked.tamper = 0, losing((3, "Masked"))
    with pytest.raises(RunError, match=r"0 shares of client 0's secret came, 3 must; .*a sum of round 1 is unmasked"):
        both.masked.step()


def wire_class(kind: str) -> Any:
    from thinwire.runtime import payloads

    return getattr(payloads, kind)


def test_no_frame_holds_a_reply_or_a_secret_in_the_open(net: Net, tmp_path: Path) -> None:
    """Of two runs that differ in their secrets alone no masked reply is the same, and their states are."""
    seen: list[list[Frame]] = [[], []]
    states = []
    for run, frames in enumerate(seen):
        both = Secured(FAST, net, tmp_path / str(run))
        both.masked.watch = frames.append
        both.masked.step()
        states.append(state_bytes(both.masked.state))
    assert states[0] == states[1]
    one, two = ([bytes(f) for f in frames if f.header().kind in KINDS] for frames in seen)
    assert len(one) == len(two) == 16
    assert not {*one} & {*two}


def test_bytes_of_keys_are_counted_apart_and_masked_scalars_take_twice_the_plain_ones_at_most(
    net: Net, tmp_path: Path
) -> None:
    method = Quick(**(SEEDS | {"steps": 200}))
    sizes = (4,) * 7
    masked = Secured(method, net, tmp_path, Secure(examples=16), sizes).masked
    plain = Federation(method, net, tmp_path / "plain", sizes=sizes)
    under, over = masked.step().visits[0], plain.step().visits[0]
    assert under.bytes_keys is not None
    assert over.bytes_keys is None
    assert under.bytes_up <= 2 * over.bytes_up
    assert under.bytes_up + under.bytes_down <= 2 * (over.bytes_up + over.bytes_down)
    assert masked.history[0].ledger.keys[0] == under.bytes_keys


def test_signs_take_the_bits_of_the_count_of_clients_and_learn_as_plain_ones_do(net: Net, tmp_path: Path) -> None:
    """After the first round, in which only scales are found; what they leave is owed, and comes later."""
    method = OneBit(lr=1e-2, steps=4, batch_size=4, weighting="uniform")
    masked = Secured(method, net, tmp_path, Secure(), (12, 8, 16), rounds=8).masked
    plain = Federation(method, net, tmp_path / "plain", 8, (12, 8, 16))
    losses = []
    for federation in (plain, masked):
        method.materialise(federation.state, net)
        start = mean_loss(net.model, federation.data[0], 16)[0]
        federation.run()
        method.materialise(federation.state, net)
        losses.append(start - mean_loss(net.model, federation.data[0], 16)[0])
    assert losses[1] > 0.7 * losses[0] > 0
    blocks, reports = -(-net.size // 1024), 40
    most = -(-net.size * 2 // 8) + 5 * blocks + reports
    assert most < masked.history[-1].visits[0].bytes_up < most + 100
    assert masked.history[-1].visits[0].bytes_up < 2.1 * plain.history[-1].visits[0].bytes_up


@pytest.mark.parametrize(
    ("method", "secure", "line"),
    [
        (FedKSeed(pro=True, shared=True), Secure(examples=9), r"^method\.pro: "),
        (OneBit(), Secure(examples=9), r"^method\.weighting: must be .uniform. under privacy\.secure"),
        (OneBit(weighting="uniform", code="eden"), Secure(), r"^method\.code: must be signs under privacy\.secure"),
        (OneBit(weighting="uniform", gradient={0: "probe"}), Secure(), r"^method\.gradient: must be one for all"),
        (GradualDiff(), Secure(examples=9), r"^privacy\.secure: GradualDiff makes more of its clients' replies"),
        (FedKSeed(), Secure(examples=9), r"^method\.shared: must be true"),
        (FedAvg(), Secure(), r"^privacy\.secure\.examples: missing"),
        (FedAvg(aggregation=Median()), Secure(examples=9), r"^method\.aggregation: median looks at each reply"),
    ],
)
def test_what_has_no_plain_sum_is_refused_with_the_reason(method: Any, secure: Secure, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        linear_of(method, secure)
    assert "\n" not in str(caught.value)


def test_numbers_beyond_the_bound_are_cut_and_counted_together(net: Net, tmp_path: Path) -> None:
    both = Secured(
        FedAvg(lr=0.5, steps=2, batch_size=4, optimiser="sgd"), net, tmp_path, Secure(examples=16, bound=1e-3)
    )
    both.masked.step()
    assert both.masked.metrics["cut"] > 10
    assert state_bytes(both.masked.state) == state_bytes(both.plain_round(range(4)))
