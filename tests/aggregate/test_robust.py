"""Every way to combine updates against its plain definition in numpy, and what a few hostile clients can do to it."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, closed_data
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from one_of_ten import ONE, scaled
from pydantic import TypeAdapter
from rows import ROWS, Nets, net_for, opened
from test_cli import refused
from tiny import tiny_folder, tiny_rows, write_jsonl
from torch import Tensor

from thinwire import wire
from thinwire.aggregate import columns
from thinwire.aggregate.mean import Mean, Setting, Update
from thinwire.aggregate.robust import AnyAggregation, Clipped, Gated, Krum, Median, Trimmed, Vote
from thinwire.core import Averaged, Method
from thinwire.errors import ConfigError
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.methods.onebit import OneBit
from thinwire.runtime import cohort
from thinwire.wire.frame import SPOOL_ABOVE

ANY: TypeAdapter[Any] = TypeAdapter(AnyAggregation)
Floats = NDArray[np.float64]


# the plain definitions, each of changes [clients, numbers] and weights [clients]


def mean(changes: Floats, weights: Floats) -> Floats:
    found: Floats = weights @ changes / weights.sum()
    return found


def clipped(changes: Floats, bound: float | None) -> Floats:
    lengths = np.linalg.norm(changes, axis=1)
    bound = float(np.median(lengths)) if bound is None else bound
    return changes * np.minimum(1, bound / lengths)[:, None]


def trimmed(changes: Floats, share: float) -> Floats:
    cut = min(math.ceil(round(share * len(changes), 9)), (len(changes) - 1) // 2)
    return np.sort(changes, axis=0)[cut : len(changes) - cut].mean(axis=0)


def krum(changes: Floats, weights: Floats, attackers: int, keep: int) -> Floats:
    scores = []
    for one in range(len(changes)):
        far = sorted(float(np.sum((changes[one] - changes[i]) ** 2)) for i in range(len(changes)) if i != one)
        scores.append(sum(far[: len(changes) - attackers - 2]))
    chosen = np.argsort(scores, kind="stable")[:keep]
    return mean(changes[chosen], weights[chosen])


def vote(changes: Floats, scale: float | None) -> Floats:
    size = np.median(np.abs(changes), axis=0) if scale is None else scale
    return np.sign(np.sign(changes).sum(axis=0)) * size


RULES: dict[str, tuple[Mean, Callable[[Floats, Floats], Floats]]] = {
    "mean": (Mean(), mean),
    "clipped": (Clipped(bound=1.5), lambda u, w: mean(clipped(u, 1.5), w)),
    "clipped to the median": (Clipped(), lambda u, w: mean(clipped(u, None), w)),
    "median": (Median(), lambda u, w: np.median(u, axis=0)),
    "trimmed": (Trimmed(share=0.2), lambda u, w: trimmed(u, 0.2)),
    "trimmed a lot": (Trimmed(share=0.45), lambda u, w: trimmed(u, 0.45)),
    "krum": (Krum(attackers=2), lambda u, w: krum(u, w, 2, 1)),
    "multi-krum": (Krum(attackers=1, keep=4), lambda u, w: krum(u, w, 1, 4)),
    "vote": (Vote(), lambda u, w: vote(u, None)),
    "vote without scales": (Vote(scale=0.01), lambda u, w: vote(u, 0.01)),
    "clipped, then median": (Clipped(then=Median()), lambda u, w: np.median(clipped(u, None), axis=0)),
    "clipped, then trimmed": (Clipped(bound=2.0, then=Trimmed()), lambda u, w: trimmed(clipped(u, 2.0), 0.2)),
    "clipped, then krum": (Clipped(then=Krum()), lambda u, w: krum(clipped(u, None), w, 1, 1)),
}


@given(
    rule=st.sampled_from(sorted(RULES)),
    clients=st.integers(7, 12),
    numbers=st.integers(1, 40),
    room=st.sampled_from([1, 200, columns.ROOM]),
    states=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=300, deadline=None)
def test_it_is_its_plain_definition(
    rule: str, clients: int, numbers: int, room: int, states: bool, dtype: torch.dtype, seed: int
) -> None:
    """Changes or states of two tensors, in memory at once or by columns from a file."""
    draw = np.random.Generator(np.random.PCG64(seed))
    lengths = draw.exponential(1.0, (clients, 1))
    changes = torch.from_numpy(draw.standard_normal((clients, numbers + 3)) * lengths).to(dtype)
    weights, start = draw.integers(1, 20, clients).astype(float), torch.from_numpy(draw.standard_normal(numbers + 3))
    states = states and not rule.startswith("vote")
    start = start.to(dtype) if states else torch.zeros(numbers + 3, dtype=dtype)
    sent = changes + start
    changes = sent - start  # as they have been rounded
    updates = [(i, Update(split(row, numbers), weights[i], loss=1.0)) for i, row in enumerate(sent)]
    aggregation, plain = RULES[rule]
    origin = split(start, numbers) if states else {}
    expected = plain(changes.double().numpy(), weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "ROOM", room)
        found, metrics = aggregation(iter(updates), Setting(origin))
    ours = torch.cat([found["a"].flatten(), found["b"]]).double() - start.double()
    assert found["a"].shape == (1, numbers)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6, atol=1e-6 * (1 + np.abs(sent.numpy()).max()))
    assert metrics["loss"] == pytest.approx(1.0)


def split(row: Tensor, numbers: int) -> dict[str, Tensor]:
    return {"a": row[:numbers].view(1, -1), "b": row[numbers:]}


@pytest.mark.parametrize("rule", ["median", "trimmed", "vote"])
def test_a_tensor_is_combined_of_those_that_hold_it(rule: str) -> None:
    rows = [torch.tensor([float(i), -1.0 - i]) for i in (1, 2, 6, 4, 7)]
    updates = [(i, Update({"a": row} | ({"b": row} if i < 3 else {}), 1)) for i, row in enumerate(rows)]
    found, _ = RULES[rule][0](iter(updates), Setting())
    plain = RULES[rule][1]
    assert found["a"].numpy() == pytest.approx(plain(torch.stack(rows).double().numpy(), np.ones(5)))
    assert found["b"].numpy() == pytest.approx(plain(torch.stack(rows[:3]).double().numpy(), np.ones(3)))


def test_krum_takes_a_tensor_that_is_not_sent_for_unchanged() -> None:
    near, far = torch.tensor([5.0]), torch.tensor([9.0])
    updates = [(i, Update({"w": far if i == 2 else near} if i != 3 else {}, 1)) for i in range(5)]
    at = Setting(origin={"w": near})
    found, _ = Krum(keep=4)(iter(updates), at)
    assert found["w"].tolist() == [5.0]
    assert set(at.left_out) == {2}


@given(
    rule=st.sampled_from(["median", "trimmed", "clipped, then median", "clipped, then trimmed"]),
    honest=st.integers(5, 9),
    seed=st.integers(0, 1 << 30),
    size=st.sampled_from([1e-3, 1.0, 1e3, 5e4]),
)
@settings(max_examples=100, deadline=None)
def test_few_hostile_clients_leave_each_number_among_the_honest(rule: str, honest: int, seed: int, size: float) -> None:
    draw = np.random.Generator(np.random.PCG64(seed))
    hostile = (honest - 1) // 4  # a fifth of all at most, as much as `trimmed` cuts
    rows = np.concatenate([draw.standard_normal((honest, 6)), size * draw.standard_normal((hostile, 6))])
    updates = [(i, Update({"w": torch.from_numpy(row)}, 1e9 if i >= honest else 1)) for i, row in enumerate(rows)]
    found, _ = RULES[rule][0](iter(updates), Setting())
    least = np.minimum(rows[:honest].min(axis=0), 0) if "clipped" in rule else rows[:honest].min(axis=0)
    most = np.maximum(rows[:honest].max(axis=0), 0) if "clipped" in rule else rows[:honest].max(axis=0)
    assert (found["w"].numpy() >= least - 1e-12).all()
    assert (found["w"].numpy() <= most + 1e-12).all()


@pytest.mark.parametrize("keep", [1, 3])
def test_krum_leaves_out_who_is_far_away_and_says_so(keep: int) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 5, generator=draw)
    rows[[1, 4]] += 1e4
    at = Setting()
    found, _ = Krum(attackers=2, keep=keep)(((i, Update({"w": row}, 1)) for i, row in enumerate(rows)), at)
    assert {1, 4} <= set(at.left_out)
    assert len(at.left_out) == 7 - keep
    assert "krum: " in at.left_out[1]
    torch.testing.assert_close(found["w"], rows[[i for i in range(7) if i not in at.left_out]].mean(0))


def test_krum_of_too_few_replies_moves_nothing() -> None:
    at = Setting()
    assert Krum(attackers=2)([(i, Update({"w": torch.ones(1)}, 1)) for i in range(6)], at) == ({}, {})
    assert set(at.left_out.values()) == {"krum against 2 needs 7 replies, and there are 6"}


def test_a_bound_holds_one_update_at_a_time_and_its_median_all() -> None:
    assert [ANY.validate_python(k).keeps_all for k in ("mean", "clipped", "median", "trimmed", "krum", "vote")] == [
        False,
        *[True] * 5,
    ]
    assert not Clipped(bound=1.0).keeps_all
    assert Clipped(bound=1.0, then=Median()).keeps_all
    alive: list[weakref.ref[Tensor]] = []

    def updates() -> Iterator[tuple[int, Update]]:
        for i in range(6):
            assert sum(ref() is not None for ref in alive) <= 1  # the one before may still be bound
            tensor = torch.full((4,), float(i))
            alive.append(weakref.ref(tensor))
            yield i, Update({"w": tensor}, 1)
            del tensor

    Clipped(bound=1.0)(updates(), Setting())
    assert len(alive) == 6


def test_a_running_bound_is_the_median_of_the_last_rounds_medians() -> None:
    """Also where most of a round are hostile, which its own median would follow."""
    draw, history = np.random.Generator(np.random.PCG64(0)), list[float]()
    running, once = Clipped(bound="running"), Clipped()
    assert running.keeps_all
    for round in range(14):
        changes = draw.standard_normal((6, 20)) * draw.exponential(1.0 + round, (6, 1))
        if round == 13:
            changes[:4] *= 1e3
        updates = [(i, Update({"w": torch.from_numpy(row)}, 1.0)) for i, row in enumerate(changes)]
        found, metrics = running(iter(updates), Setting(lengths=history))
        middle = float(np.median(np.linalg.norm(changes, axis=1)))
        bound = float(np.median([*history[-9:], middle]))
        assert (metrics["length"], metrics["bound"]) == pytest.approx((middle, bound))
        np.testing.assert_allclose(found["w"].numpy(), mean(clipped(changes, bound), np.ones(6)), rtol=1e-5, atol=1e-6)
        history.append(metrics["length"])
    assert metrics["bound"] < 2 * np.median(history[3:13])
    assert once(iter(updates), Setting())[1]["bound"] > 100 * metrics["bound"]
    assert "length" not in once(iter(updates), Setting())[1]


@pytest.mark.parametrize("aggregation", [rule for rule, _ in RULES.values()], ids=list(RULES))
def test_nothing_is_made_of_no_update(aggregation: Mean) -> None:
    assert aggregation(iter([]), Setting()) == ({}, {})


# in rounds: methods whose replies are weights, differences, scalars and signs

FIRST: dict[str, Any] = {"steps": 3, "batch_size": 4}
SEEDS: dict[str, Any] = {"seeds": 64, "lr": 2e-4, "eps": 1e-3, "steps": 8, "batch_size": 4, "shared": True}
KINDS: dict[str, Callable[[Any], Method]] = {
    "fedavg": lambda a: FedAvg(**FIRST, lr=3e-3, aggregation=a),
    "fedit": lambda a: FedAvg(**FIRST, lr=1e-2, aggregation=a),
    "fedkseed": lambda a: FedKSeed(**SEEDS, aggregation=a),
    "gradualdiff": lambda a: GradualDiff(**FIRST, lr=3e-3, aggregation=a),
    "onebit": lambda a: OneBit(**FIRST, lr=1e-2, aggregation=a),
}
SIZES = (8, 6, 7, 9, 8)
Forge = Callable[[Federation, Any], Any]


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    return opened(tmp_path_factory.mktemp("nets"))


def begun(method: Method, kind: str, nets: Nets, folder: Path, forge: Forge | None = None, **more: Any) -> Federation:
    """A federation of five in which one client's replies are forged."""

    def tamper(client: int, frame: wire.Frame) -> wire.Frame:
        if client != ONE or forge is None:
            return frame
        header, up = frame.header(), wire.decode(method.Up, frame)
        return wire.encode(forge(federation, up), run=header.run, round=header.round, client=client, held=header.held)

    net = net_for({"fedit": "fedit", "onebit": "onebit"}.get(kind, kind), nets)
    federation = Federation(method, net, folder, rounds=2, sizes=SIZES, tamper=tamper, **more)
    return federation


def weights_of(federation: Federation) -> Tensor:
    federation.method.materialise(federation.state, federation.net)
    return torch.cat([p.detach().flatten().double() for _, p in federation.net.parameters()])


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_update_a_thousand_times_as_long_moves_no_further_than_others(kind: str, nets: Nets, tmp_path: Path) -> None:
    """The end of a round lies no further away than what a client alone can do; the plain mean is thrown there."""

    def moved(name: str, aggregation: str, cohort: range, forge: Forge | None = None) -> float:
        method = KINDS[kind](ANY.validate_python(aggregation))
        federation = begun(method, kind, nets, tmp_path / name, forge)
        start = weights_of(federation)
        federation.step(cohort)
        return float((weights_of(federation) - start).norm())

    usual = max(moved(f"alone {i}", "mean", range(i, i + 1)) for i in range(len(SIZES)))
    for aggregation in ("mean", "clipped", "median", "trimmed", "krum"):
        far = moved(aggregation, aggregation, range(len(SIZES)), lambda federation, up: scaled(federation, up, -1e3))
        if aggregation == "mean":
            assert far > 20 * usual
        else:
            assert far <= 1.5 * usual, aggregation


def test_what_a_client_claims_to_hold_is_no_vote(nets: Nets, tmp_path: Path) -> None:
    """2^62 rows are no legal number; a million of them, where nobody knows better, count once under a median."""
    ends = []
    for i, claim in enumerate((None, 10**6)):
        forge = None if claim is None else lambda federation, up: dataclasses.replace(up, examples=10**6)
        federation = begun(KINDS["fedavg"](Median()), "fedavg", nets, tmp_path / str(i), forge).run()
        ends.append(bytes(wire.encode(federation.state)))
    assert ends[0] == ends[1]
    forge = lambda federation, up: dataclasses.replace(up, examples=1 << 62)  # noqa: E731
    federation = begun(KINDS["fedavg"](Mean()), "fedavg", nets, tmp_path / "lie", forge)
    assert "Illegal: examples is" in str(federation.step().visits[ONE].error)


MORE = ("fedit", "fedavg-keep", "cgfed-state", "fedcybgd-full", "gradualdiff-topk", "onebit-plain", "scaffold-lora")
GATED = sorted(
    row
    for row, (method, *_) in ROWS.items()
    if isinstance(method, Averaged) and method.aggregation == Mean() and row in (method.model_dump()["name"], *MORE)
)


@pytest.mark.parametrize("row", GATED)
def test_a_gate_that_nobody_fails_changes_nothing(row: str, nets: Nets, tmp_path: Path) -> None:
    """Each update is tried on the state and forgotten: frames, versions and states are those without a gate."""
    net, states = net_for(row, nets), []
    public = closed_data(net, 4, 7)
    for aggregation in (Mean(), Gated(bound=1e9)):
        method = ROWS[row].method.model_copy(update={"aggregation": aggregation})
        frames: list[wire.Frame] = []
        place = tmp_path / aggregation.kind
        federation = Federation(method, net, place, rounds=2, public=public, watch=frames.append).run()
        states.append([*map(bytes, frames), bytes(wire.encode(federation.state))])
        assert not any(at.server.left_out for at in federation.history)
    if row.startswith("fedkseed"):  # whose plain mean is made of sums in float64
        one, two = (wire.decode(method.State, wire.Frame(last)).gains for *_, last in states)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
    else:
        assert states[0] == states[1]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_gate_leaves_out_who_does_harm_and_says_so(
    kind: str, nets: Nets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = net_for(kind, nets)
    if kind in ("fedit", "onebit"):  # no factor, however long, makes the random model any worse: it is held by length

        def length(*_: Any) -> tuple[float, int]:
            return math.sqrt(sum(float(p.detach().square().sum()) for _, p in net.parameters())), 1

        monkeypatch.setattr("federation.mean_loss", length)
    public = closed_data(net, 12, 7)
    forge = lambda federation, up: scaled(federation, up, -300.0)  # noqa: E731
    method = KINDS[kind](Gated(bound=0.5))
    federation = begun(method, kind, nets, tmp_path / "forged", forge, public=public)
    at = federation.step()
    assert "the loss on data.public rises by" in str(at.visits[ONE].left_out)
    assert at.visits[ONE].error is None
    assert [visit.left_out for client, visit in at.visits.items() if client != ONE] == [None] * 4
    assert federation.metrics["left_out"] == 1
    absent = begun(method, kind, nets, tmp_path / "absent", public=public)
    absent.step(cohort=[client for client in range(5) if client != ONE])
    if kind == "onebit":  # who replies is in nothing but the mean
        assert bytes(wire.encode(federation.state)) == bytes(wire.encode(absent.state))
    torch.testing.assert_close(weights_of(federation), weights_of(absent))


def test_replies_lie_in_files_until_the_round_has_ended(nets: Nets, tmp_path: Path) -> None:
    spool, seen = tmp_path / "spool", list[int]()
    spool.mkdir()

    class Counting(Median):
        def __call__(self, updates: Any, at: Setting | None = None) -> Any:
            held = list(updates)
            seen.append(len(list(spool.glob("*.frame"))))
            return super().__call__(held, at)

    method = FedAvg(**FIRST, lr=3e-3).model_copy(update={"aggregation": Counting()})
    federation = Federation(method, net_for("fedavg", nets), tmp_path, spool=spool, rounds=1, sizes=SIZES).run()
    assert seen == [len(SIZES)]
    assert list(spool.iterdir()) == []
    method = FedAvg(**FIRST, lr=3e-3, aggregation=Median())
    inside = Federation(method, net_for("fedavg", nets), tmp_path / "inside", rounds=1, sizes=SIZES)
    assert bytes(wire.encode(inside.run().state)) == bytes(wire.encode(federation.state))


def test_a_median_of_whole_models_needs_one_model_and_a_fifth(tmp_path: Path) -> None:
    """Twenty replies of a model that goes through files; memory is counted where numpy and torch take it."""
    from thinwire import memory

    shapes = {f"w{i}": (512, 1024) for i in range(16)} | {"embedding": (1536, 1024)}
    size = 4 * sum(math.prod(shape) for shape in shapes.values())
    assert size > SPOOL_ABOVE
    draw, payload = torch.Generator().manual_seed(0), FedAvg.Down
    frames = []
    for _ in range(20):
        weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        frames.append(wire.encode(payload(weights), spool=tmp_path))
        del weights
    updates = [(i, Update(wire.decode(payload, frame).weights, 1)) for i, frame in enumerate(frames)]
    Median()([(0, Update({"w": torch.ones(3)}, 1))], Setting())
    memory.trim()
    before = memory.resident()
    memory.reset()
    found, _ = Median()(updates, Setting(spool=tmp_path))
    peak = memory.peak() - before
    assert list(found) == list(shapes)
    assert size <= peak * 1.05  # or nothing was measured
    assert peak <= 1.2 * size, f"{peak / size:.2f} models"
    for frame in frames:
        frame.remove()


@pytest.mark.parametrize(
    ("aggregation", "clients", "line"),
    [
        (
            {"kind": "krum", "attackers": 2},
            6,
            "krum against 2 that keeps 1 needs 7 clients in a round, and there are 6",
        ),
        ({"kind": "krum", "keep": 6}, 6, "krum against 1 that keeps 6 needs 7 clients in a round"),
        ({"kind": "trimmed", "share": 0.4}, 4, "share 0.4 of a round's 4 clients, cut at each end, leaves nobody"),
        ({"kind": "clipped", "then": {"kind": "krum"}}, 4, "krum against 1 that keeps 1 needs 5 clients"),
        ({"kind": "gated", "then": "krum"}, 4, "krum against 1 that keeps 1 needs 5 clients"),
    ],
)
def test_a_round_too_small_for_it_is_refused_before_anything_runs(
    aggregation: dict[str, Any], clients: int, line: str
) -> None:
    method = FedAvg(aggregation=aggregation)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"method.aggregation: {line}"):
        cohort.check([cohort.All()], method, clients)
    with pytest.raises(ConfigError, match=r"^method\.aggregation: "):
        cohort.check([cohort.All(rounds=1), cohort.Uniform(n=clients)], method, 20)
    cohort.check([cohort.All()], method, 20)


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in (OneBit, GradualDiff, FedAvg, FedKSeed):
        fields: dict[str, Any] = {"code": "eden"} if wrong is OneBit else {}
        with pytest.raises(ValueError, match="a vote is of codes of one bit"):
            wrong(aggregation="vote", **fields)  # type: ignore[arg-type]
    OneBit(aggregation="vote")  # type: ignore[arg-type]
    GradualDiff(aggregation="vote", codec="blocks", bits=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"less than 0[.]5"):
        FedAvg(aggregation={"kind": "trimmed", "share": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="set shared = true"):
        FedKSeed(aggregation="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aggregation mean alone"):
        FedKSeed(aggregation="clipped", pro=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind"):
        FedAvg(aggregation="bulyan")  # type: ignore[arg-type]


def test_it_is_told_apart_by_its_kind_and_read_back() -> None:
    for rule, _ in RULES.values():
        method = OneBit(aggregation=rule)
        assert OneBit.model_validate_json(method.model_dump_json(), strict=True) == method
    assert FedAvg().model_dump()["aggregation"] == {"kind": "mean"}  # as run files have it since before
    assert ANY.validate_python({"kind": "gated", "then": {"kind": "clipped", "then": "median"}}).kinds == (
        "gated",
        "clipped",
        "median",
    )


def test_a_fedkseed_reply_is_its_moves(nets: Nets, tmp_path: Path) -> None:
    """The vector of K coefficients of one client is what its mean alone adds to the gains."""
    method = FedKSeed(**(SEEDS | {"shared": False}), weight_decay=0.01)
    federation = Federation(method, net_for("fedkseed", nets), tmp_path, rounds=2, sizes=SIZES)
    federation.step()
    server = federation.server(2, (1,))
    up = method.client_update(method.broadcast(federation.state, server, 1, None), federation.client(1, 2))
    update = method.update_of(federation.state, server, 1, up)
    after, _ = method.aggregate(federation.state, server, [(1, up)])
    shrink = update.metrics["shrink"]
    assert shrink < 1
    expected = shrink * federation.state.gains + update.tensors["gains"]
    torch.testing.assert_close(after.gains, expected, rtol=1e-12, atol=0)
    assert after.shrink == pytest.approx(federation.state.shrink * shrink, rel=1e-12)


def test_a_command_refuses_it_in_one_line(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(24, closed=True))
    (tmp_path / "run.toml").write_text(
        f'''
[model]
path = "{tmp_path}/model"
[data]
path = "{tmp_path}/rows.jsonl"
clients = 4
prompt = "{{input}}: it was"
answer = " {{output}}"
[method]
name = "fedavg"
'''
    )
    run = ("run", tmp_path / "run.toml", "--out", tmp_path / "run")
    assert "krum against 1 that keeps 1 needs 5 clients" in refused(*run, "method.aggregation=krum")
    assert "leaves nobody" in refused(*run, "method.aggregation.kind=trimmed", "method.aggregation.share=0.4")
    assert "must be less than 0.5" in refused(*run, "method.aggregation.kind=trimmed", "method.aggregation.share=0.5")
    assert "a vote is of codes of one bit" in refused(*run, "method.aggregation=vote")
    assert refused(*run, "method.aggregation=gated").startswith("data.public: missing")
    assert "'bulyan' is not one of" in refused(*run, "method.aggregation=bulyan")
    assert not (tmp_path / "run").exists()
