"""Client-level noise in shares: the masked sum is what a trusted server would have, and nobody sees a reply."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net

pytest.importorskip("cryptography", reason="comes with: pip install 'thinwire[secure]'")
pytest.importorskip("Crypto", reason="comes with: pip install 'thinwire[secure]'")

from silos import Silos

from thinwire import assemble
from thinwire.errors import ConfigError
from thinwire.methods.fedavg import FedAvg
from thinwire.model.net import Net
from thinwire.privacy import shares
from thinwire.privacy.accountant import epsilon
from thinwire.privacy.integers import FINE
from thinwire.privacy.protection import Protection
from thinwire.privacy.released import in_words
from thinwire.privacy.secrets import SystemSecrets
from thinwire.privacy.secure import Secure
from thinwire.records import read_records
from thinwire.runtime.course import Watch, train
from thinwire.runtime.endpoint import ACTIONS
from thinwire.runtime.masked import MaskedClients
from thinwire.runtime.round import run_round
from thinwire.runtime.seats import Seats
from thinwire.runtime.secure import SecureRound

PRIVACY = {"level": "client", "epsilon": 30.0, "delta": 1e-2, "clip": 0.5, "secure": {}}
FIRST: dict[str, Any] = {"lr": 3e-3, "steps": 2, "batch_size": 4, "weighting": "uniform"}
SEEDS: dict[str, Any] = {"name": "fedkseed", "seeds": 64, "lr": 2e-4, "eps": 1e-3, "steps": 3, "batch_size": 4}


class Still(SystemSecrets):
    """No noise; what was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def integers(self, count: int, deviation: int) -> Any:
        self.asked.append(deviation)
        return super().integers(count, deviation) * 0


@dataclass(frozen=True)
class Private(Seats):
    """Seats whose secrets are these."""

    secrets: Any = field(default_factory=SystemSecrets)

    def server(self, round: int, cohort: Any = ()) -> Any:
        return replace(super().server(round, cohort), secrets=self.secrets)

    def client(self, id: int, round: int) -> Any:
        return replace(super().client(id, round), secrets=self.secrets)


@dataclass
class Protected(Federation):
    """A federation that is private of its clients."""

    protection: Protection = field(default_factory=lambda: Protection("client", 0.05, 1.0))
    secrets: Any = field(default_factory=Still)

    @property
    def seats(self) -> Seats:
        own = super().seats
        protected = dict.fromkeys(range(len(self.sizes)), self.protection)
        parts = {name: getattr(own, name) for name in Seats.__dataclass_fields__}
        parts |= {"protected": protected, "protection": self.protection}
        return Private(**parts, secrets=self.secrets)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def federation(net: Net, folder: Path, masked: bool, **fields: Any) -> Protected:
    secure = Secure()
    how: dict[str, Any] = {"actions": ACTIONS, "function": run_round}
    if masked:
        how = {"actions": MaskedClients(secure).actions, "function": SecureRound(secure)}
    return Protected(FedAvg(**FIRST), net, folder, 4, (12, 8, 16, 9), **how, **fields)


def losing(clients: set[int]) -> Any:
    """Their masked replies do not come."""
    return lambda client, frame: None if client in clients and frame.header().kind == "Masked" else frame


@pytest.mark.parametrize("clip", [0.05, 3.0])
def test_without_noise_the_masked_mean_is_the_trusted_servers(clip: float, net: Net, tmp_path: Path) -> None:
    found = []
    for masked in (True, False):
        here = federation(net, tmp_path / str(masked), masked, protection=Protection("client", clip, 1.0))
        for _ in range(2):
            at = here.step()
            assert [visit.error for visit in at.visits.values()] == [None] * 4
        here.method.materialise(here.state, net)
        found.append(torch.cat([p.detach().flatten() for _, p in net.parameters()]).clone())
    start = torch.cat([net.base[name].flatten() for name in net.names])
    torch.testing.assert_close(*found, rtol=0, atol=2e-7 + clip / FINE)  # float32 weights, and a unit
    assert 0 < (found[0] - start).norm() <= 2 * clip * (1 + 1e-6)


def test_each_share_is_what_the_smallest_sum_needs_of_it(net: Net, tmp_path: Path) -> None:
    secrets = Still()
    federation(net, tmp_path, True, secrets=secrets).step()
    assert {*secrets.asked} == {shares.deviation(3)}
    for minimum in (3, 4, 50):
        assert FINE <= shares.deviation(minimum) * minimum**0.5 < 1.01 * FINE


def test_the_noise_on_the_sum_has_the_stated_width_or_more(net: Net, tmp_path: Path) -> None:
    """Of three clients that of the run file; of four, whose sum may be unmasked when one leaves, more."""
    noises = []
    for name, lost in (("three", {3}), ("four", set[int]())):
        moved = []
        for secrets in (SystemSecrets(), Still()):
            here = federation(net, tmp_path / f"{name}{type(secrets).__name__}", True, secrets=secrets)
            here.tamper = losing(lost)
            here.step()
            here.method.materialise(here.state, net)
            moved.append(torch.cat([p.detach().double().flatten() for _, p in net.parameters()]))
        noises.append(float((moved[0] - moved[1]).std()))
    assert noises[0] == pytest.approx(0.05 * 1.0 / 4, rel=0.03)
    assert noises[1] == pytest.approx(0.05 * 1.0 / 4 * (4 / 3) ** 0.5, rel=0.03)


@pytest.mark.parametrize("method", [{"name": "fedavg", **FIRST}, SEEDS | {"shared": True, "weighting": "uniform"}])
def test_a_run_spends_what_it_says_and_shows_no_reply(method: dict[str, Any], silos: Silos, tmp_path: Path) -> None:
    run = silos.run(method, privacy=PRIVACY | {"noise": 3.0})
    summary = train(assemble.begin(*assemble.prepared(run)).job(tmp_path / "run", Watch()))
    assert summary["privacy"]["epsilon"] == pytest.approx(epsilon(3.0, 1.0, 2, 1e-2), abs=0.01)
    assert "a client was there changes what all see, the server too, by epsilon" in in_words(summary["privacy"])
    assert not any("server" in line for line in summary["privacy"]["not_counted"])
    for record in read_records(tmp_path / "run" / "rounds.jsonl"):
        assert not {"loss", "skipped", "cut"} & {*record["metrics"]}
        assert all(client.get("loss") is None for client in record["clients"])
        assert all(client["bytes_keys"] for client in record["clients"])


def test_signs_have_no_length_to_bound(silos: Silos, tmp_path: Path) -> None:
    run = silos.run({"name": "onebit", **FIRST}, privacy=PRIVACY)
    with pytest.raises(ConfigError) as caught:
        assemble.begin(*assemble.prepared(run)).job(tmp_path / "run", Watch())
    assert str(caught.value) == (
        "privacy.level: what onebit adds up under masks has a length of its own, which no clip bounds: record, or no "
        "privacy.secure"
    )
