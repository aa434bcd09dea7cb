"""The channel against a radio written out: complex gains, one number after another, and the error's closed form."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factored import lora_net, watched
from federation import Federation, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.aggregate.air import Air, spread
from thinwire.aggregate.mean import Mean, Setting, Update
from thinwire.aggregate.robust import Clipped
from thinwire.core import Averaged
from thinwire.errors import ConfigError
from thinwire.keys import Key
from thinwire.methods import METHODS
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedex import FedEx
from thinwire.methods.fedkseed import FedKSeed
from thinwire.train.products import OnProducts

WEIGHTS = (12.0, 8.0, 16.0, 3.0)
SHAPES = {"a": (60, 50), "b": (700,)}
LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 2, "batch_size": 4}


def updates(offset: float = 0.0) -> list[tuple[int, Update]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (client, Update({n: offset + (client + 1) * torch.randn(s, generator=draw) for n, s in SHAPES.items()}, weight))
        for client, weight in enumerate(WEIGHTS)
    ]


def setting(seed: int, origin: dict[str, Tensor] | None = None) -> Setting:
    return Setting(origin or {}, key=Key.root(seed))


def plain(found: list[tuple[int, Update]]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: sum(u.weight * u.tensors[name].double().numpy() for _, u in found) / sum(WEIGHTS)  # type: ignore[misc]
        for name in SHAPES
    }


@pytest.mark.parametrize(("snr", "jam"), [(10.0, None), (5.0, 0.0)])
def test_it_is_what_a_receiver_makes_of_all_that_is_sent_at_once(snr: float, jam: float | None) -> None:
    """The same gains, with phases of their own, and the same noise, through the transmitters and the receiver."""
    air, sent, key = Air(snr=snr, jam=jam), updates(), Key.root(7).fold("air")
    ours, metrics = air(iter(sent), Setting(key=Key.root(7)))
    power, phases = 2.5, np.exp(1j * np.array([0.3, 2.0, -1.1, 4.0]))
    channel = np.array([math.sqrt(air.gain(float(key.fold("gain", k).uniform(1)[0]))) for k in range(4)]) * phases
    for name, shape in SHAPES.items():
        us = [u.tensors[name].double().numpy() for _, u in sent]
        shares = [w / sum(WEIGHTS) for w in WEIGHTS]
        eta = power * min(abs(h) ** 2 / (p * u.std()) ** 2 for h, p, u in zip(channel, shares, us, strict=True))
        received = np.zeros(shape, complex)
        for h, p, u in zip(channel, shares, us, strict=True):
            b = math.sqrt(eta) * p * u.std() / h
            symbols = b * (u - u.mean()) / u.std()
            assert np.mean(abs(symbols) ** 2) <= power * (1 + 1e-9)
            received += h * symbols
        noise = power * 10 ** (-snr / 10) + (0 if jam is None else power * 10 ** (jam / 10))
        z = key.fold("noise", name).numpy().standard_normal(shape, np.float32).astype(float) * math.sqrt(noise)
        means = sum(p * u.mean() for p, u in zip(shares, us, strict=True))
        estimate = (received + z).real / math.sqrt(eta) + means
        np.testing.assert_allclose(ours[name].double().numpy(), estimate, rtol=0, atol=1e-5 * abs(estimate).max())
    assert metrics["weakest"] == pytest.approx(min(abs(channel)) ** 2)


@pytest.mark.parametrize("fading", ["none", "rayleigh"])
@pytest.mark.parametrize("snr", [5.0, 10.0, 20.0])
def test_the_measured_error_is_the_closed_form_within_sampling_error(snr: float, fading: Any) -> None:
    """Sixty rounds of 3,700 numbers: each tensor's squared error over what the gains and spreads of its round say."""
    sent, exact, ratios, reported = updates(), plain(updates()), dict.fromkeys(SHAPES, 0.0), 0.0
    rounds = 60
    for seed in range(rounds):
        found, metrics = Air(snr=snr, fading=fading)(iter(sent), setting(seed))
        total, expected = 0.0, 0.0
        for name, shape in SHAPES.items():
            gains = [
                -math.log(1 - Key.root(seed).fold("air", "gain", k).uniform(1)[0]) if fading == "rayleigh" else 1.0
                for k in range(4)
            ]
            spreads = [float(np.std(u.tensors[name].double().numpy())) for _, u in sent]
            most = max((w / sum(WEIGHTS) * s) ** 2 / g for w, s, g in zip(WEIGHTS, spreads, gains, strict=True))
            square = float(((found[name].double().numpy() - exact[name]) ** 2).sum())
            ratios[name] += square / (math.prod(shape) * most / 10 ** (snr / 10)) / rounds
            total, expected = total + square, expected + math.prod(shape) * most / 10 ** (snr / 10)
        reported += total / (metrics["noise"] ** 2 * 3_700) / rounds
        assert metrics["noise"] == pytest.approx(math.sqrt(expected / 3_700), rel=1e-5)
    for name, shape in SHAPES.items():  # a mean of n squares of a normal law has the deviation sqrt(2 / n)
        assert abs(ratios[name] - 1) < 4 * math.sqrt(2 / (rounds * math.prod(shape))), name
    assert abs(reported - 1) < 0.05


def test_the_gains_are_rayleighs() -> None:
    gains = np.array([Air().gain(float(Key.root(0).fold("air", "gain", k).uniform(1)[0])) for k in range(4_000)])
    assert gains.mean() == pytest.approx(1, abs=4 / math.sqrt(4_000))
    assert (gains < 0.1).mean() == pytest.approx(1 - math.exp(-0.1), abs=0.02)
    assert Air().gain(0.0) > 0
    assert Air(fading="none").gain(0.3) == 1


def test_without_noise_it_is_the_mean_to_the_bit_and_nears_it_with_the_snr() -> None:
    exact, _ = Mean()(iter(updates()))
    faint, _ = Air(snr=300)(iter(updates()), setting(3))
    assert all(torch.equal(faint[name], exact[name]) for name in SHAPES)
    still, metrics = Air(snr=math.inf)(iter(updates()), setting(3))
    assert all(torch.equal(still[name], exact[name]) for name in SHAPES)
    assert metrics["noise"] == 0
    errors = [
        float((Air(snr=snr)(iter(updates()), setting(3))[0]["a"] - exact["a"]).norm()) for snr in (0, 10, 20, 40, 80)
    ]
    assert all(one > 3 * other for one, other in itertools.pairwise(errors))
    jammed = [Air(snr=40, jam=jam)(iter(updates()), setting(3))[1]["noise"] for jam in (None, -60, -40, 0)]
    assert jammed[0] < jammed[1] < jammed[2] < jammed[3]
    assert jammed[2] == pytest.approx(math.sqrt(2) * jammed[0])  # a jammer as strong as the noise


def test_one_long_update_sets_the_noise_for_all_unless_it_is_clipped_before() -> None:
    honest, hostile = updates(), updates()
    hostile[3] = (3, hostile[3][1]._replace(tensors={n: 1e4 * t for n, t in hostile[3][1].tensors.items()}))

    def noise(aggregation: Any, sent: list[tuple[int, Update]]) -> float:
        return float(aggregation(iter(sent), setting(3))[1]["noise"])

    capped = Clipped(then=Air())
    assert noise(Air(), hostile) > 1e3 * noise(Air(), honest)
    assert noise(capped, hostile) <= 1.001 * noise(Air(), honest)  # each is as long as the middle one at most
    assert noise(capped, hostile) == pytest.approx(noise(capped, honest), rel=0.3)


def test_what_all_know_is_not_sent() -> None:
    """States are sent as changes from the round's start: the noise is of the size of the change, not of the weights."""
    origin = {name: torch.full(shape, 100.0) for name, shape in SHAPES.items()}
    big, one = Air()(iter(updates(100.0)), setting(5, origin))
    small, other = Air()(iter(updates()), setting(5))
    assert one["noise"] == pytest.approx(other["noise"], rel=1e-4)
    for name in SHAPES:
        torch.testing.assert_close(big[name] - 100, small[name], rtol=0, atol=1e-4)
    ramp = torch.arange(50.0).expand(60, 50)
    assert spread(ramp + 2, ramp) == 0
    assert spread(ramp, None) == pytest.approx(float(np.arange(50).std()))


def test_only_those_who_hold_a_tensor_send_it() -> None:
    sent = updates()
    some = [(k, u._replace(tensors={n: t for n, t in u.tensors.items() if n == "a" or k < 2})) for k, u in sent]
    found, _ = Air(snr=300)(iter(some), setting(0))
    pair = sent[:2]
    expected = sum(u.weight * u.tensors["b"] for _, u in pair) / sum(u.weight for _, u in pair)
    torch.testing.assert_close(found["b"], expected)
    assert Air()(iter([]), setting(0)) == ({}, {})


def test_a_tensor_is_read_once() -> None:
    reads: list[str] = []

    class Counting(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            reads.append(name)
            return super().__getitem__(name)

    Air()(((k, u._replace(tensors=Counting(u.tensors))) for k, u in updates()), setting(0))
    assert sorted(reads) == ["a"] * 4 + ["b"] * 4


def test_at_infinite_snr_a_run_is_fedavgs_and_at_any_other_it_is_not(tmp_path: Path) -> None:
    net = tiny_net(tmp_path / "model")

    def state(name: str, aggregation: Mean) -> bytes:
        run = Federation(FedAvg(**LOCAL, aggregation=aggregation), net, tmp_path / name, rounds=2).run()
        return bytes(wire.encode(run.state))

    exact = state("mean", Mean())
    assert state("still", Air(snr=math.inf)) == exact
    noisy = state("noisy", Air(snr=10))
    assert noisy != exact
    assert state("again", Air(snr=10)) == noisy


def test_the_channel_of_a_round_is_the_same_after_a_resume(tmp_path: Path) -> None:
    net = lora_net(tmp_path / "model")
    method = FedAvg(**LOCAL, aggregation=Air(snr=5, jam=-5))
    whole = Federation(method, net, tmp_path / "whole", rounds=4).run()
    half = Federation(method, net, tmp_path / "half", rounds=4).run(2)
    saved = wire.decode(method.State, wire.encode(half.state))
    rest = Federation(method, net, tmp_path / "half", rounds=4, state=saved, round=2, held=half.held).run()
    assert bytes(wire.encode(rest.state)) == bytes(wire.encode(whole.state))
    noises = [whole.history[i].server.key.fold("air", "noise", "x").word() for i in range(4)]
    assert len(set(noises)) == 4


def test_noise_is_of_the_size_of_what_a_round_moves(tmp_path: Path) -> None:
    """FedAvg's updates are states: the error is by what each reply has changed, not by how large weights are."""
    net = lora_net(tmp_path / "model")
    federation = watched(FedAvg(**LOCAL, aggregation=Air(snr=10, fading="none")), net, tmp_path, rounds=1).run()
    squares, count = 0.0, 0
    for name in net.names:
        spreads = {
            c: float((up.weights[name] - net.base[name]).double().std(correction=0)) for c, up in federation.ups.items()
        }
        most = max(federation.sizes[c] / 36 * spread for c, spread in spreads.items())
        squares, count = squares + net.base[name].numel() * most**2 / 10, count + net.base[name].numel()
    assert federation.metrics["noise"] == pytest.approx(math.sqrt(squares / count), rel=1e-4)


def test_every_method_whose_server_takes_a_mean_has_it() -> None:
    means = {name for name, cls in METHODS.items() if issubclass(cls, Averaged) and not issubclass(cls, OnProducts)}
    assert {"fedavg", "fedkseed", "gradualdiff", "onebit", "scaffold", "fedelmy"} <= means
    for name in means:
        assert METHODS[name].model_validate({"aggregation": "air"}).aggregation == Air(), name  # type: ignore[attr-defined]


def test_scalars_on_a_pool_are_sent_over_the_air_too(tmp_path: Path) -> None:
    net, states = tiny_net(tmp_path / "model"), {}
    for snr in (10.0, 300.0):
        method = FedKSeed(seeds=16, steps=8, lr=1e-4, eps=1e-3, aggregation=Air(snr=snr))
        federation = Federation(method, net, tmp_path / str(snr), rounds=1).run()
        states[snr] = federation.state.gains
        assert federation.metrics["noise"] > 0
    apart = (states[10.0] - states[300.0]).norm() / states[300.0].norm()
    assert 0.01 < float(apart) < 3


def test_a_run_file_chooses_it() -> None:
    from thinwire import config

    tree: dict[str, Any] = {"model": {"path": "x"}, "data": {"path": "y"}, "rounds": 1}
    method = {"name": "fedavg", "aggregation": {"kind": "air", "snr": 5, "jam": -3.0}}
    assert config.parse(tree | {"method": method}).method.aggregation == Air(snr=5, jam=-3.0)  # type: ignore[attr-defined]
    assert config.parse(tree | {"method": {"name": "fedavg", "aggregation": "air"}}).method.aggregation == Air()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"method\.aggregation\.snr: must be a finite number"):
        config.parse(tree | {"method": {"name": "fedavg", "aggregation": {"kind": "air", "snr": math.inf}}})
    with pytest.raises(ConfigError, match=r"method\.aggregation\.snrr"):
        config.parse(tree | {"method": {"name": "fedavg", "aggregation": {"kind": "air", "snrr": 3}}})
    assert FedAvg(aggregation={"kind": "mean"}).aggregation == Mean()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stack"):  # a server that needs all factors has no use for their sum
        FedEx(aggregation={"kind": "air"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="snr"):
        Air(snr=math.nan)
