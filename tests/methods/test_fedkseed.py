"""FedKSeed against the paper's equations, written slowly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, tiny_net
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from thinwire import streams, wire
from thinwire.compress.entropy import integers
from thinwire.core import StaleVersion
from thinwire.data.batch import Example, collate
from thinwire.keys import Key, reduced
from thinwire.methods.fedkseed import Accumulators, FedKSeed, Steps
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.perturb.pool import GRID, TILTS, Pool, draws_key, grid_of, seed_probabilities, seed_tilts, shares_sent
from thinwire.perturb.probe import Probe
from thinwire.perturb.scalars import SKIPPED, as_floats, as_sent
from thinwire.perturb.spsa import move, shrink_of
from thinwire.train.objective import loss


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def picks(method: FedKSeed, key: int, clients: Sequence[int], shares: Any = None) -> Any:
    """The directions that the clients draw."""
    pool = Pool(Directions(0, method.law), method.seeds)
    return pool.picks(key, clients, (method.steps, method.queries), shares)


def weights(net: Net) -> Tensor:
    return torch.cat([p.detach().double().flatten() for _, p in net.parameters()])


class Oracle:
    """One client and the server as the paper has them: whole directions, whole weights, a global model by averaging."""

    def __init__(self, net: Net, method: FedKSeed, pool: int) -> None:
        self.net, self.method, directions = net, method, Directions(pool, method.law)
        self.z = {
            j: torch.cat([directions.direction(n, p.shape, j).double().flatten() for n, p in net.parameters()])
            for j in range(method.seeds)
        }

    def fill(self, flat: Tensor) -> None:
        offset = 0
        for _, parameter in self.net.parameters():
            parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape).float()
            offset += parameter.numel()

    def client(self, start: Tensor, batches: Any, seeds: list[int], lr: float) -> tuple[Tensor, list[float]]:
        w, scalars, eps = start.clone(), [], self.method.eps
        for j in seeds:
            batch = next(batches)
            found = []
            for step in (eps, -eps):
                self.fill(w + step * self.z[j])
                with torch.no_grad():
                    found.append(float(loss(self.net.model, batch)))
            g = (found[0] - found[1]) / (2 * eps)
            w = w - lr * (g * self.z[j] + self.method.weight_decay * w)
            scalars.append(g)
        return w, scalars


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_rounds_are_the_papers_and_the_global_model_the_mean_of_the_clients(
    decay: float, schedule: Any, net: Net, tmp_path: Path
) -> None:
    method = FedKSeed(
        seeds=16, steps=6, batch_size=4, lr=3e-4, eps=1e-3, weight_decay=decay, schedule=schedule, wire="paper",
        law="gaussian",
    )  # fmt: skip
    federation = Federation(method, net, tmp_path, rounds=3)
    oracle = Oracle(net, method, federation.state.pool)
    net.reset()
    mean = weights(net)
    for round in (1, 2, 3):
        lr = 3e-4 if schedule == "constant" else 3e-4 * (1 - (round - 1) / 3)
        finals = []
        for id, rows in enumerate(federation.sizes):
            client = federation.client(id, round)
            seeds = reduced(streams.words(draws_key(federation.server(round, (0, 1, 2)).key), [id], 6), 16)[0].tolist()
            batches = client.data.batches(client.key.fold("batches"), 4)
            finals.append(rows * oracle.client(mean, batches, seeds, lr)[0])
        mean = torch.stack(finals).sum(0) / sum(federation.sizes)
        federation.step()
    net.reset()
    start = weights(net)
    method.materialise(federation.state, net)
    moved = weights(net) - start
    # g is measured in float32; at three times the rate the steps diverge, and rounding with them, otherwise on each CPU
    assert (moved - (mean - start)).norm() < 5e-4 * (mean - start).norm()
    assert moved.norm() > 1


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("form", "queries"), [("paper", 1), ("thin", 1), ("thin", 3)])
def test_one_clients_weights_are_the_rebuild_from_its_scalars(
    form: Any, queries: int, decay: float, net: Net, tmp_path: Path
) -> None:
    method = FedKSeed(
        seeds=4096,
        steps=200 // queries,
        batch_size=1,
        lr=1e-4,
        eps=1e-3,
        weight_decay=decay,
        wire=form,
        queries=queries,
    )
    federation = Federation(method, net, tmp_path, sizes=(16,), rounds=1)
    server, client = federation.server(1, (0,)), federation.client(0, 1)
    up = method.client_update(method.broadcast(federation.state, server, 0, None), client)
    # a client makes no last move, since nobody would see it
    pool = Directions(federation.state.pool, method.law)
    picks = Pool(pool, method.seeds).picks(draws_key(server.key), [0], (method.steps, method.queries))[0]
    last = -1e-4 / queries * up.scalars[-queries:].double().numpy()
    move(net, pool, picks[-1], last, shrink_of(1e-4, decay))
    local = weights(net)
    net.forget()
    state, _ = method.aggregate(federation.state, server, [(0, up)])
    Pool(pool, method.seeds).rebuild(net, state.gains.float(), state.shrink)
    rebuilt = weights(net)
    if form == "paper":
        net.forget()
        method.materialise(state, net)
        assert torch.equal(weights(net), rebuilt)
    net.reset()
    assert (local - weights(net)).norm() > 1e-3 * rebuilt.norm()
    assert (local - rebuilt).norm() < 1e-6 * rebuilt.norm()


def test_the_model_is_the_gains_on_the_grid_and_the_rest_is_sent_later(net: Net, tmp_path: Path) -> None:
    method = FedKSeed(seeds=64, steps=8, batch_size=4, lr=1e-4)
    federation = Federation(method, net, tmp_path, rounds=6)
    federation.step()
    grid = federation.state.grid
    touched = federation.state.gains[federation.state.gains != 0]
    assert grid == pytest.approx(float(touched.square().mean().sqrt()) / GRID)
    for _ in range(5):
        federation.step()
    assert federation.state.grid == grid
    method.materialise(federation.state, net)
    found = weights(net)
    nearest = torch.round(federation.state.gains / grid) * grid
    assert (nearest - federation.state.gains).abs().max() <= grid / 2
    net.forget()
    Pool(Directions(federation.state.pool, method.law), method.seeds).rebuild(net, nearest.float())
    assert torch.equal(weights(net), found)


def test_who_returns_is_sent_the_changes_and_who_lost_its_version_the_whole(net: Net, tmp_path: Path) -> None:
    """And all three have the bits that the server means."""
    method = FedKSeed(seeds=2048, steps=8, batch_size=4, lr=1e-4)
    federation = Federation(method, net, tmp_path, rounds=9)
    for _ in range(4):
        federation.step(cohort=(0, 1))
    held = federation.held[0]
    state, server = federation.state, federation.server(5, (0, 2))
    method.materialise(state, net)
    meant = weights(net)
    back, new = (method.broadcast(state, server, id, version) for id, version in ((0, held), (2, None)))
    assert back.base == held
    assert new.base is None
    assert back.levels is not None
    assert new.levels is not None
    assert len(back.levels) < len(new.levels)
    for id, down in ((0, back), (2, new)):
        net.forget()
        client = federation.client(id, 5)
        method.receive(down, client)
        assert torch.equal(weights(net), meant)
        assert client.held == state.version
    stale = dataclasses.replace(back, base="0" * 32)
    with pytest.raises(StaleVersion):
        method.receive(stale, federation.client(0, 5))


@pytest.mark.parametrize("form", ["float32", "float16", "int8"])
def test_scalars_survive_their_rounding(form: Any) -> None:
    scalars = np.linspace(-30, 7, 100, dtype=np.float32)
    scalars[4:6] = np.nan
    found = as_floats([as_sent(scalars, form)], form, (1, scalars.size)).ravel()
    assert np.isnan(found).tolist() == np.isnan(scalars).tolist()
    bound = {"float32": 0.0, "float16": 30 * 2**-11, "int8": 30 / 254 * 1.0001}[form]
    assert np.nanmax(np.abs(found - scalars)) <= bound
    nothing = np.full(100, np.nan, np.float32)
    assert np.isnan(as_floats([as_sent(nothing, form)], form, (1, nothing.size))).all()


def test_a_client_that_joins_last_rebuilds_the_same_bits(net: Net, tmp_path: Path) -> None:
    federation = Federation(FedKSeed(seeds=32, steps=4, batch_size=4, lr=1e-3), net, tmp_path, rounds=4)
    for _ in range(3):
        federation.step(cohort=(0, 1))
    down = federation.method.broadcast(federation.state, federation.server(4, (0, 2)), 2, None)
    hashes = []
    for id in (0, 2):
        net.forget()
        with torch.no_grad():
            for _, parameter in net.parameters():
                parameter.fill_(id)
        federation.method.receive(down, federation.client(id, 4))
        hashes.append(net.state_sha256())
    assert hashes[0] == hashes[1]


def test_the_order_of_the_replies_does_not_matter(net: Net, tmp_path: Path) -> None:
    """To the last bits of float64, which the float32 on the wire does not show."""
    method = FedKSeed(seeds=16, steps=4, batch_size=4, lr=1e-3)
    federation = Federation(method, net, tmp_path, rounds=1)
    server = federation.server(1, (0, 1, 2))
    down = method.broadcast(federation.state, server, 0, None)
    ups = [(id, method.client_update(down, federation.client(id, 1))) for id in range(3)]
    gains = [method.aggregate(federation.state, server, order)[0].gains for order in (ups, ups[::-1])]
    assert torch.equal(gains[0].float(), gains[1].float())


def test_frames_are_the_papers_kilobytes(net: Net, tmp_path: Path) -> None:
    for pro, seeds, paper in ((False, 4096, 17_988), (True, 1024, 9_796)):
        method = FedKSeed(seeds=seeds, pro=pro, steps=200, batch_size=1, lr=1e-5, wire="paper")
        at = Federation(method, net, tmp_path / str(pro), sizes=(4,), rounds=1).step()
        assert at.ledger.bytes_down + at.ledger.bytes_up <= paper + 400


@pytest.mark.parametrize(("pro", "seeds", "most"), [(False, 4096, 4_700), (True, 1024, 2_000)])
def test_frames_on_the_thin_wire_to_a_newcomer(pro: bool, seeds: int, most: int, net: Net, tmp_path: Path) -> None:
    """With gains as wide as forty rounds of eight clients leave them (benchmarks/frames.py has those rounds)."""
    method = FedKSeed(seeds=seeds, pro=pro, steps=200)
    server = Federation(method, net, tmp_path).server(40, (0,))
    normal = torch.randn(2, seeds, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = Accumulators(2**63, normal[0], 1.0, 20 + normal[1], torch.ones(seeds).double(), 1 / 25)
    down = method.broadcast(state, server, 0, None)
    up = Steps(None, *as_sent(np.random.default_rng(0).normal(0, 20, 200).astype(np.float32), "float16"), 1000, 0.5)
    frames = [wire.encode(payload, run=2**31, round=40, client=199) for payload in (down, up)]
    assert sum(map(len, frames)) <= most


def test_a_nan_loss_skips_the_step_and_is_counted(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Probe.losses
    calls = iter(range(1000))

    def losses(self: Probe, *args: Any) -> list[tuple[float, float]]:
        ((plus, minus),) = real(self, *args)
        return [(math.nan if next(calls) % 4 == 0 else plus, minus)]

    monkeypatch.setattr(Probe, "losses", losses)
    federation = Federation(FedKSeed(seeds=16, steps=8, batch_size=4, lr=1e-3), net, tmp_path, sizes=(8,))
    federation.step()
    assert federation.metrics["skipped"] == 2
    assert math.isfinite(federation.metrics["loss"])
    assert torch.isfinite(federation.state.gains).all()


def test_a_client_whose_every_loss_is_nan_changes_nothing(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "losses", lambda *_: [(math.nan, math.nan)])
    federation = Federation(FedKSeed(seeds=16, steps=8, batch_size=4), net, tmp_path, sizes=(8,))
    at = federation.step()
    assert at.visits[0].error is None
    assert not federation.state.gains.any()
    assert federation.metrics["skipped"] == 8


def test_an_infinite_accumulator_from_the_wire_is_refused(net: Net, tmp_path: Path) -> None:
    federation = Federation(FedKSeed(seeds=16), net, tmp_path)
    down = federation.method.broadcast(federation.state, federation.server(1, (0,)), 0, None)
    for change in ({"grid": math.inf}, {"grid": 1e300}, {"shrink": math.nan}, {"lr": math.inf}):
        bad = dataclasses.replace(down, levels=integers.pack(np.arange(16)), **change)
        with pytest.raises(wire.Illegal, match=r"gains|a rate"):
            federation.method.client_update(bad, federation.client(0, 1))
    for levels in (
        None,
        b"",
        b"\x01",
        b"\x09" + bytes(16),
        integers.pack(np.arange(15)),
        b"\x01garbage, not zstandard",
    ):
        with pytest.raises(wire.Illegal, match="levels"):
            federation.method.client_update(dataclasses.replace(down, levels=levels), federation.client(0, 1))
    paper = FedKSeed(seeds=16, wire="paper")
    for gains in (None, torch.zeros(15), torch.full((16,), math.inf), torch.zeros(16, dtype=torch.float64)):
        with pytest.raises(wire.Illegal, match="gains"):
            paper.client_update(dataclasses.replace(down, gains=gains), federation.client(0, 1))


INT32 = torch.int32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seeds": torch.tensor([0, 1, 2, 16], dtype=INT32)}, "outside the pool"),
        ({"seeds": torch.tensor([0, 1, 2, -1], dtype=INT32)}, "outside the pool"),
        ({"seeds": torch.zeros(3, dtype=INT32)}, r"not int32 \[4\]"),
        ({"seeds": torch.zeros(4, dtype=torch.int64)}, "int64"),
        ({"seeds": None}, "seeds travel"),
        ({"scalars": torch.ones(3)}, r"not float32 \[4\]"),
        ({"scalars": torch.ones((2, 2))}, r"not float32 \[4\]"),
        ({"scalars": torch.ones(4, dtype=torch.float16)}, "torch.float16"),
        ({"scalars": torch.full((4,), 1e7)}, "beyond"),
        ({"scalars": torch.full((4,), math.inf)}, "beyond"),
        ({"scalars": torch.tensor([1.0, math.nan, 1.0, 1.0])}, "in part"),
        ({"unit": 0.0}, "unit is 0"),
        ({"unit": math.nan}, "unit is nan"),
        ({"unit": math.inf}, "unit is inf"),
        ({"unit": 6e4}, "unit is 60000"),
    ],
)
def test_what_a_client_may_not_answer(change: dict[str, Any], reason: str) -> None:
    method = FedKSeed(seeds=16, steps=2, queries=2, wire="paper")
    good = Steps(torch.zeros(4, dtype=INT32), torch.ones(4), 1.0, 8, 0.5)
    zeros = torch.zeros(16, dtype=torch.float64)
    state = Accumulators(1, zeros, 1.0, zeros, zeros + 1)
    method.check(state, 0, good)
    method.check(state, 0, dataclasses.replace(good, scalars=torch.tensor([1.0, 1.0, math.nan, math.nan])))
    with pytest.raises(wire.Illegal, match=reason):
        method.check(state, 0, dataclasses.replace(good, **change))


def test_seeds_do_not_travel_on_the_thin_wire() -> None:
    method = FedKSeed(seeds=16, steps=2, scalars="int8")
    zeros = torch.zeros(16, dtype=torch.float64)
    state = Accumulators(1, zeros, 1.0, zeros, zeros + 1)
    good = Steps(None, torch.tensor([SKIPPED, 127], dtype=torch.int8), 1.0, 8, 0.5)
    method.check(state, 0, good)
    with pytest.raises(wire.Illegal, match="seeds travel"):
        method.check(state, 0, dataclasses.replace(good, seeds=torch.zeros(2, dtype=INT32)))


def test_pro_is_uniform_at_first_then_tilted_by_at_most_e() -> None:
    first = seed_probabilities(torch.zeros(32, dtype=torch.float64))
    assert first == pytest.approx(torch.full((32,), 1 / 32, dtype=torch.float64))
    later = seed_probabilities(torch.linspace(0, 900, 32, dtype=torch.float64))
    assert later.sum() == pytest.approx(1.0)
    assert later.max() / later.min() == pytest.approx(math.e)
    assert later.argmax() == 31


def test_pros_statistic_is_the_papers_history_of_amplitudes(net: Net, tmp_path: Path) -> None:
    """The mean over each direction's whole history of clipped |g|, which begins with one 0."""
    method = FedKSeed(seeds=8, pro=True, steps=10, batch_size=4, lr=1e-3, amplitude_clip=20.0, wire="paper")
    histories: list[list[float]] = [[0.0] for _ in range(8)]

    def watch(client: int, frame: wire.Frame) -> wire.Frame:
        up = wire.decode(Steps, frame)
        for j, g in zip(up.seeds.tolist(), up.scalars.tolist(), strict=True):
            histories[j].append(min(abs(g), 20.0))
        return frame

    federation = Federation(method, net, tmp_path, rounds=2, tamper=watch).run()
    means = torch.tensor([sum(h) / len(h) for h in histories], dtype=torch.float64)
    down = method.broadcast(federation.state, federation.server(3, ()), 0, None)
    spread = (means - means.min()) / (means.max() - means.min() + 1e-10)
    assert down.probabilities == pytest.approx(torch.softmax(spread, 0).float(), rel=1e-6)
    assert sum(len(h) for h in histories) == 8 + 2 * 3 * 10


def test_pro_draws_by_the_probabilities_it_is_sent() -> None:
    p = torch.tensor([0.1, 0.2, 0.0, 0.7])
    method = FedKSeed(seeds=4, pro=True, steps=4000, wire="paper")
    drawn = picks(method, 5, [0], shares_sent(p, method.seeds)).ravel()
    assert np.bincount(drawn, minlength=4) / 4000 == pytest.approx(p.numpy(), abs=0.03)


def test_pro_draws_by_the_tilts_it_is_sent() -> None:
    amplitudes = torch.linspace(0, 30, 16, dtype=torch.float64)
    assert seed_tilts(amplitudes).tolist() == list(range(16))
    assert pytest.approx(256 * np.exp(np.arange(16) / 15), abs=0.5) == TILTS
    expected = seed_probabilities(amplitudes).numpy()
    assert TILTS / TILTS.sum() == pytest.approx(expected, rel=2e-3)
    method = FedKSeed(seeds=16, pro=True, steps=20_000)
    shares = shares_sent(integers.pack(np.arange(16)), method.seeds)
    drawn = picks(method, 5, [0], shares).ravel()
    assert drawn.dtype == np.int64
    assert np.bincount(drawn, minlength=16) / 20_000 == pytest.approx(expected, abs=0.01)
    for bad in (np.arange(16) + 1, np.arange(16) - 1):
        with pytest.raises(wire.Illegal, match="tilt"):
            shares_sent(integers.pack(bad), method.seeds)


def test_clients_and_rounds_draw_differently(net: Net, tmp_path: Path) -> None:
    method = FedKSeed(seeds=4096, steps=200)
    federation = Federation(method, net, tmp_path)
    keys = [draws_key(federation.server(round, (0,)).key) for round in (1, 2, 3)]
    assert len({tuple(drawn.ravel()) for key in keys for drawn in picks(method, key, range(3))}) == 9


def test_a_rebuild_is_one_sum_in_the_order_of_the_pool(net: Net) -> None:
    """w0 - sum_j A_j z_j, A = 0 left out, against a sum in float64."""
    gains = torch.zeros(4096)
    gains[[7, 900, 4095]] = torch.tensor([1e-3, -2e-3, 5e-4])
    directions = Directions(77)
    Pool(directions, len(gains)).rebuild(net, gains)
    for name, parameter in net.parameters():
        expected = net.base[name].double()
        for j in (7, 900, 4095):
            expected -= gains[j].double() * directions.direction(name, parameter.shape, j).double()
        assert torch.allclose(parameter.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("law", "most"), [("gaussian", 16), ("sign", 4), ("lowrank", 4)])
def test_the_mean_of_g_z_is_the_gradient(tmp_path: Path, law: Any, most: int) -> None:
    """Over N directions its cosine with autograd's gradient tends to 1 as sqrt(N / (N + d)), whatever the law."""
    model = tiny_model(
        hidden_size=4, intermediate_size=4, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1,
        vocab_size=16, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    net = Net(model, tiny_tokenizer(), tmp_path)
    tokens = Key.root(0).integers(16, 64).tolist()
    batch = collate([Example(tuple(tokens[i : i + 6]), tuple(tokens[i + 6 : i + 8])) for i in range(0, 64, 8)], 2)
    loss(net.model, batch).backward()
    gradient = torch.cat([p.grad.flatten() for _, p in net.parameters()]).double()
    d, directions = net.size, Directions(5, law)
    assert d <= 2000
    total, cosines = torch.zeros(d, dtype=torch.float64), {}
    with Probe(net, directions) as probe:
        for j in range(most * d):
            ((plus, minus),) = probe.losses(batch, [j], 1e-2)
            z = torch.cat([directions.direction(n, p.shape, j).flatten() for n, p in net.parameters()])
            total += (plus - minus) / 2e-2 * z.double()
            if j + 1 in (d, 4 * d, 16 * d):
                cosines[(j + 1) // d] = float(torch.nn.functional.cosine_similarity(total, gradient, dim=0))
    for multiple, cosine in cosines.items():
        assert cosine == pytest.approx(math.sqrt(multiple / (multiple + 1)), abs=0.05)
    assert len(cosines) == (3 if most == 16 else 2)
    assert cosines[most] > (0.95 if most == 16 else 0.85)


def test_the_unit_does_not_carry_a_scalar_beyond_its_bound() -> None:
    zeros = torch.zeros(16, dtype=torch.float64)
    state = Accumulators(1, zeros, 1.0, zeros, zeros + 1)
    for form, scalar in (("float16", torch.float16), ("float32", torch.float32)):
        method = FedKSeed(seeds=16, steps=2, scalars=form)
        good = Steps(None, torch.full((2,), 6e4, dtype=scalar), 1.0, 8, 0.5)
        method.check(state, 0, good)
        with pytest.raises(wire.Illegal, match="unit is 6"):
            method.check(state, 0, dataclasses.replace(good, unit=6e4))
    method = FedKSeed(seeds=16, steps=2, scalars="int8")
    good = Steps(None, torch.full((2,), 127, dtype=torch.int8), 6e4 / 127, 8, 0.5)
    method.check(state, 0, good)
    with pytest.raises(wire.Illegal, match="unit is 480"):
        method.check(state, 0, dataclasses.replace(good, unit=480.0))


def test_the_grid_is_the_honest_one_to_the_bit_unless_a_reply_is_far_from_all() -> None:
    rng = np.random.default_rng(0)
    gains = rng.normal(size=500)
    plain = math.sqrt(np.square(gains).mean()) / 4
    lengths = np.stack([rng.uniform(1, 7, 10), rng.uniform(1, 70, 10)])
    assert grid_of(gains, 0.0, lengths) == plain
    assert grid_of(gains, 0.0, None) == plain
    assert grid_of(np.zeros(0), 0.0, None) == 0.0
    assert grid_of(np.zeros(0), 0.25, None) == 0.25
    assert grid_of(gains, plain, None) == plain  # and stays
    lengths[:, 3] *= 1e4  # one reply is all that there is to be seen of the mean
    poisoned = grid_of(gains, 0.0, lengths)
    assert poisoned < plain / 50


def test_a_grid_that_swallows_the_gains_is_made_anew() -> None:
    gains = np.concatenate([np.full(50, 1e3), np.full(450, 1.0)])
    coarse = 1e3 / 4
    assert grid_of(gains, coarse, None) == 1.0
    assert grid_of(gains, 1.0, None) == 1.0


def test_one_reply_does_not_set_the_grid(net: Net, tmp_path: Path) -> None:
    """Of four, all on every direction: the grid is within a factor of eight of what it is without that reply."""

    def shout(client: int, frame: wire.Frame) -> wire.Frame:
        header, up = frame.header(), wire.decode(Steps, frame)
        if client != 1:
            return frame
        up = dataclasses.replace(up, scalars=torch.full_like(up.scalars, 6e4))
        return wire.encode(up, run=1, round=header.round, client=1, held=header.held)

    method = FedKSeed(seeds=16, steps=16, batch_size=2)
    honest = Federation(method, net, tmp_path / "a", sizes=(8, 8, 8, 8)).run(1)
    loud = Federation(method, net, tmp_path / "b", sizes=(8, 8, 8, 8), tamper=shout).run(1)
    assert loud.history[0].visits[1].error is None  # legal: it counts, but its size is not the grid's
    assert honest.state.grid < loud.state.grid < 8 * honest.state.grid


def union(federation: Federation) -> Any:
    """The rows of all clients in one batch."""
    first = federation.data[0]
    return collate([e for data in federation.data for e in data.examples], first.pad, first.candidates)


@pytest.mark.parametrize("sides", [1, 2])
def test_shared_directions_are_a_central_step_on_the_union_of_the_rows(sides: Any, net: Net, tmp_path: Path) -> None:
    """DeComFL and, one-sided, BAFFLE: of equal batches, what the clients' scalars average to is the union's."""
    method = FedKSeed(
        seeds=512, steps=1, queries=3, batch_size=8, lr=1e-3, eps=1e-3, shared=True, sides=sides, scalars="float32"
    )
    federation = Federation(method, net, tmp_path, sizes=(8, 8, 8), rounds=1)
    key = draws_key(federation.server(1, (0, 1, 2)).key)
    drawn = Pool(Directions(0), 512).picks(key, [0], (1, 3))[0, 0]
    net.reset()
    directions, expected = Directions(federation.state.pool, method.law), torch.zeros(512, dtype=torch.float64)
    start, batch = [p.detach().clone() for _, p in net.parameters()], union(federation)

    def central(step: float, j: int) -> float:
        with torch.no_grad():
            for (name, parameter), w in zip(net.parameters(), start, strict=True):
                parameter.copy_(w + step * directions.direction(name, w.shape, j))
            return float(loss(net.model, batch))

    for j in drawn.tolist():
        high, low = central(1e-3, j), central(-1e-3 if sides == 2 else 0.0, j)
        expected[j] += 1e-3 / 3 * (high - low) / (sides * 1e-3)
    net.forget()
    federation.step()
    assert federation.state.gains.count_nonzero() == len({*drawn.tolist()})
    assert (federation.state.gains - expected).norm() < 2e-2 * expected.norm()  # of losses in float32
    apart = Federation(method.model_copy(update={"shared": False}), net, tmp_path / "apart", sizes=(8, 8, 8)).run(1)
    assert apart.state.gains.count_nonzero() > 2 * len({*drawn.tolist()})


def test_all_clients_that_share_draw_the_same_and_in_each_round_others(net: Net, tmp_path: Path) -> None:
    method, seen = FedKSeed(seeds=4096, steps=4, batch_size=4, shared=True, wire="paper"), []

    def watch(client: int, frame: wire.Frame) -> wire.Frame:
        seen.append(wire.decode(Steps, frame).seeds.tolist())
        return frame

    Federation(method, net, tmp_path, rounds=2, tamper=watch).run()
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert seen[3] == seen[4] == seen[5]


@pytest.mark.parametrize("together", [False, True])
def test_one_sided_differences_measure_where_they_begin_once_a_step(
    together: bool, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = FedKSeed(
        seeds=64, steps=1, queries=3, batch_size=4, eps=1e-2, sides=1, together=together, scalars="float32"
    )
    federation = Federation(method, net, tmp_path, sizes=(8,), rounds=1)
    passes, real = [], Probe._passes

    def watched(self: Probe, measure: Any, batch: Any, steps: list[tuple[int, float]]) -> Any:
        passes.append([step for _, step in steps])
        return real(self, measure, batch, steps)

    monkeypatch.setattr(Probe, "_passes", watched)
    server, client = federation.server(1, (0,)), federation.client(0, 1)
    up = method.client_update(method.broadcast(federation.state, server, 0, None), client)
    assert passes == [[1e-2, 1e-2, 1e-2, 0.0]]
    drawn = picks(method, draws_key(server.key), [0])[0, 0]
    net.reset()
    batch = next(client.data.batches(client.key.fold("batches"), 4))
    with torch.no_grad():
        here = float(loss(net.model, batch))
    oracle = Oracle(net, method, federation.state.pool)
    start = weights(net)
    for j, g in zip(drawn.tolist(), up.scalars.tolist(), strict=True):
        oracle.fill(start + 1e-2 * oracle.z[j])
        with torch.no_grad():
            assert g == pytest.approx((float(loss(net.model, batch)) - here) / 1e-2, abs=2e-3)
    net.forget()
    assert method.work(1).rows == 4 * 4
    assert FedKSeed(steps=1, queries=3, batch_size=4).work(1).rows == 6 * 4
