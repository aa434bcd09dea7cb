"""Private runs: what they promise, what they spend, where they end, and who is refused in a line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from silos import SITES, SIZES, Silos

from thinwire import assemble, config
from thinwire.aggregate.mean import Mean, Update
from thinwire.aggregate.noised import noised_mean
from thinwire.assemble.privacy import check_privacy
from thinwire.config import ConfigError, Run
from thinwire.errors import ConfigError as Wrong
from thinwire.federation.policy import Policy
from thinwire.federation.site_run import run_settings
from thinwire.privacy.accountant import epsilon
from thinwire.privacy.protection import Protection
from thinwire.privacy.secrets import SystemSecrets
from thinwire.records import read_records
from thinwire.runtime.course import Course, Watch, train
from thinwire.wire import Frame, Illegal

RECORD = {"level": "record", "epsilon": 30.0, "delta": 1e-2, "clip": 0.5}
CLIENT = {"level": "client", "epsilon": 30.0, "delta": 1e-2, "clip": 0.5}
FIRST: dict[str, Any] = {"lr": 3e-3, "steps": 2, "batch_size": 4}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg", **FIRST},
    "onebit": {"name": "onebit", **FIRST},
    "gradualdiff": {"name": "gradualdiff", "start": "shared", **FIRST},
    "fedkseed": {"name": "fedkseed", "seeds": 64, "lr": 2e-4, "eps": 1e-3, "steps": 3, "batch_size": 4, "queries": 2},
    "fedzo": {"name": "fedzo", "lr": 2e-4, "eps": 1e-3, "steps": 3, "batch_size": 4},
}
TRUSTED = {"cgfed": {"name": "cgfed", **FIRST}}  # whose server alone can add the noise
VIEWS = {"cgfed": {"lora": {"rank": 2}}, "onebit": {"view": {"kind": "tied", "numbers": 64, "rank": 2}}}


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def run_of(silos: Silos, name: str, privacy: dict[str, Any], **fields: Any) -> Run:
    return silos.run((METHODS | TRUSTED)[name], model=VIEWS.get(name, {}), privacy=privacy, **fields)


def trained(run: Run, folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = train(assemble.begin(*assemble.prepared(run)).job(folder, Watch()))
    return summary


@pytest.mark.parametrize(
    ("name", "privacy"),
    [*((name, privacy) for name in METHODS for privacy in (RECORD, CLIENT)), *((name, CLIENT) for name in TRUSTED)],
    ids=lambda value: value if isinstance(value, str) else value["level"],
)
def test_a_private_run_says_what_it_spends_and_nothing_of_any_reply(
    name: str, privacy: dict[str, Any], silos: Silos, tmp_path: Path
) -> None:
    summary = trained(run_of(silos, name, privacy), tmp_path / "run")
    promised = summary["privacy"]
    assert 0.9 * 30 < promised["epsilon"] <= 30
    assert promised["level"] == privacy["level"]
    rounds = read_records(tmp_path / "run" / "rounds.jsonl")
    spent = [record["metrics"]["epsilon"] for record in rounds]
    assert 0 < spent[0] < spent[1] == promised["epsilon"]
    for record in rounds:
        assert not {"loss", "skipped"} & {*record["metrics"]}
        for client in record["clients"]:
            assert client["examples"] == 1
            assert client.get("loss") is None or math.isnan(client["loss"])
            assert client["share"] == pytest.approx(1 / 3)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"epsilon {promised['epsilon']:.4g}" in card
    assert "Not counted" in card


def test_the_epsilon_is_that_of_the_client_with_fewest_rows(silos: Silos, tmp_path: Path) -> None:
    summary = trained(run_of(silos, "fedkseed", RECORD | {"noise": 2.0}), tmp_path / "run")
    found = max(epsilon(2.0, 4 / rows, 2 * 3, 1e-2) for rows in SIZES)
    assert summary["privacy"]["epsilon"] == pytest.approx(found, abs=0.01)
    assert found == epsilon(2.0, 4 / min(SIZES), 6, 1e-2)  # not of who has most


def test_a_run_with_noise_of_its_own_ends_within_its_budget_and_stays_ended(silos: Silos, tmp_path: Path) -> None:
    most = epsilon(3.0, 1.0, 2, 1e-2)
    run = run_of(silos, "fedavg", CLIENT | {"noise": 3.0, "epsilon": most * 1.01}, rounds=5)
    summary = trained(run, tmp_path / "run")
    assert summary["rounds"] == 2
    assert summary["ended"].startswith("round 3 would spend an epsilon of ")
    assert summary["privacy"]["epsilon"] == pytest.approx(most, abs=0.01)
    again = Course(assemble.begin(*assemble.prepared(run)).job(tmp_path / "run", Watch()))
    again.begin()
    assert again.ended


def test_only_rounds_that_a_client_is_in_are_counted(silos: Silos, tmp_path: Path) -> None:
    run = run_of(silos, "fedavg", CLIENT | {"noise": 3.0}, rounds=3, cohort={"kind": "cyclic"})
    summary = trained(run, tmp_path / "run")
    assert summary["privacy"]["epsilon"] == pytest.approx(epsilon(3.0, 1.0, 1, 1e-2), abs=0.01)


def test_noise_differs_from_run_to_run(silos: Silos, tmp_path: Path) -> None:
    run = run_of(silos, "fedkseed", RECORD)
    assert trained(run, tmp_path / "a")["sha256"] != trained(run, tmp_path / "b")["sha256"]


@pytest.mark.parametrize(
    ("method", "changes", "line"),
    [
        ("fedavg", {"privacy": RECORD | {"noise": 1e-3}}, "privacy.noise: 0.001 is below 0.01, which hides nothing"),
        ("fedavg", {"privacy": RECORD | {"epsilon": 0.0}}, "privacy.epsilon: must be greater than 0, got 0.0"),
        ("fedavg", {"privacy": RECORD | {"delta": 0.2}}, "privacy.delta: 0.2 is not below one in a client's 12 rows"),
        ("fedavg", {"privacy": CLIENT | {"delta": 0.5}}, "privacy.delta: 0.5 is not below one in 3 clients"),
        (
            "fedavg",
            {"privacy": CLIENT | {"minimum": 4}},
            "cohort: a round of 3 clients, and privacy.minimum is 4",
        ),
        ("fedavg", {"privacy": RECORD, "data": {"balanced": True}}, "data.balanced: a private run draws each row in"),
        ("fedavg", {"privacy": RECORD, "data": {"order": "lfr"}}, "data.order: a private run draws each row in"),
        ("fedavg", {"privacy": CLIENT | {"noise": 0.5, "epsilon": 1.0}}, "privacy.epsilon: round 1 would spend an eps"),
        (
            "fedavg",
            {"privacy": CLIENT, "federation": {"keep_replies": True}},
            "federation.keep_replies, cross: replies of a run",
        ),
        (
            "fedavg",
            {"privacy": CLIENT, "federation": {"weights": {"by": "examples"}}},
            "federation.weights: in a private run all clients count alike; leave it out",
        ),
    ],
)
def test_what_cannot_be_private_is_refused(
    method: str, changes: dict[str, Any], line: str, silos: Silos, tmp_path: Path
) -> None:
    with pytest.raises(Wrong) as caught:
        trained(silos.run(METHODS[method], **changes), tmp_path / "run")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"name": "scaffold"}, "privacy.level: scaffold cannot be made private of a record as it is set here"),
        ({"name": "fedkseed", "sides": 1}, "privacy.level: fedkseed cannot be made private of a record as it is set"),
        ({"name": "cgfed"}, "privacy.level: cgfed cannot be made private of a record as it is set here"),
        ({"name": "fedavg", "aggregation": "median"}, "method.aggregation: [privacy] noises a mean alone, and this is"),
    ],
)
def test_methods_that_cannot_be_private_are_refused(table: dict[str, Any], line: str, silos: Silos) -> None:
    with pytest.raises(ConfigError) as caught:
        check_privacy(silos.run(table, privacy=RECORD), SITES)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("privacy", "line"),
    [
        (None, "this site's policy asks for privacy of a record, and the run has none"),
        (CLIENT, "this site's policy asks for privacy of a record, and the run has that of a client alone"),
        (RECORD, "this site's policy asks for privacy of a record with epsilon 8 at most, and the run has 30"),
        (RECORD | {"epsilon": 4.0}, "this site's policy asks for privacy of a record with delta 0.001 at most, and"),
        (RECORD | {"epsilon": 4.0, "delta": 1e-4}, None),
    ],
)
def test_a_site_takes_no_part_in_less_privacy_than_its_policy_asks_for(
    privacy: dict[str, Any] | None, line: str | None, silos: Silos, tmp_path: Path
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('templates = "any"\nchoices = "any"\n[privacy]\nepsilon_at_most = 8.0\n')
    asked = json.loads(run_settings(silos.run(METHODS["fedavg"], privacy=privacy), SITES, "0" * 16))["toml"]
    (tmp_path / "asked.toml").write_text(asked)
    run = config.load(tmp_path / "asked.toml")  # as it reaches a site
    if line is None:
        Policy.load(file).admit("train", run, None, Frame(b""))
        return
    with pytest.raises(Illegal) as caught:
        Policy.load(file).admit("train", run, None, Frame(b""))
    assert str(caught.value).startswith(line)


class Still(SystemSecrets):
    """No noise."""

    def integers(self, count: int, deviation: int) -> Any:
        return super().integers(count, deviation) * 0


def updates(lengths: Sequence[float]) -> list[tuple[int, Update]]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for client, length in enumerate(lengths):
        a, b = torch.randn(3, 4, generator=draw), torch.randn(5, generator=draw)
        scale = length / math.sqrt(float(a.square().sum() + b.square().sum()))
        found.append((client, Update({"a": a * scale, "b": b * scale}, weight=100.0 * client)))
    return found


def test_the_mean_of_clients_is_that_of_shortened_updates_all_counting_alike() -> None:
    given = updates([0.2, 5.0, 1e6])
    found = noised_mean(given, {}, Protection("client", 1.0, 2.0), 3, Still())
    wanted, _ = Mean()(
        (client, Update({name: tensor / max(1.0, length) for name, tensor in update.tensors.items()}, weight=1))
        for (client, update), length in zip(given, [0.2, 5.0, 1e6], strict=True)
    )
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2 * 2.0 / (1 << 16))


@pytest.mark.parametrize("name", METHODS)
def test_a_private_round_without_a_reply_moves_nothing(name: str, silos: Silos, tmp_path: Path) -> None:
    start = assemble.begin(*assemble.prepared(run_of(silos, name, CLIENT)))
    course = Course(start.job(tmp_path / "run", Watch()))
    course.begin()
    server = replace(course.seats.server(1, (0, 1, 2)), protection=Protection("client", 1.0, 1.0))
    state, metrics = start.run.method.aggregate(course.state, server, iter(()))
    assert state is course.state
    assert not any(metrics.values())


def test_masks_and_the_clients_own_noise_go_together(silos: Silos, tmp_path: Path) -> None:
    method = METHODS["fedkseed"] | {"shared": True, "weighting": "uniform"}
    run = silos.run(method, privacy=RECORD | {"secure": {"reports": False}})
    summary = trained(run, tmp_path / "run")
    assert 0.9 * 30 < summary["privacy"]["epsilon"] <= 30
    assert summary["bytes_keys"] > 0
    moved = [record["metrics"]["directions"] for record in read_records(tmp_path / "run" / "rounds.jsonl")]
    assert all(moved)


def test_who_does_not_reply_leaves_the_divisor_as_it_is() -> None:
    whole = noised_mean(updates([0.5, 0.5]), {}, Protection("client", 1.0, 1.0), 2, Still())
    torch.testing.assert_close(
        noised_mean(updates([0.5, 0.5]), {}, Protection("client", 1.0, 1.0), 4, Still())["a"], whole["a"] / 2
    )


def test_the_noise_on_the_mean_has_the_stated_width() -> None:
    zeros = [(0, Update({"a": torch.zeros(200_000)}, weight=1.0))]
    found = noised_mean(zeros, {"a": torch.ones(200_000)}, Protection("client", 0.3, 2.0), 5, SystemSecrets())
    # an update to where it was is one of length 1 each from the origin: shortened to the bound, below the noise
    assert float(found["a"].std()) == pytest.approx(0.3 * 2.0 / 5, rel=0.01)


def estimated_as_trained(run: Run, folder: Path) -> None:
    """The bytes of the run are within the estimate, which is no wide one."""
    from thinwire.estimate.traffic import expected, traffic

    start = assemble.begin(*assemble.prepared(run))
    trained_by = {name: start.net.base[name] for name in start.net.names}
    found = traffic(run, expected(run, [*SIZES], trained_by, start.net.model.config))
    assert found is not None
    summary = trained(run, folder)
    assert found.total[0].holds(summary["bytes_down"])
    assert found.total[1].holds(summary["bytes_up"])
    assert found.total[1].most < 1.1 * summary["bytes_up"]


def test_bytes_of_a_private_run_are_those_of_the_estimate(silos: Silos, tmp_path: Path) -> None:
    run = run_of(silos, "onebit", RECORD)
    estimated_as_trained(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "level"),
    [("fedavg", None), ("fedavg", "client"), ("fedkseed", None), ("fedkseed", "client"), ("onebit", None)],
)
def test_bytes_under_masks_are_those_of_the_estimate(
    name: str, level: str | None, silos: Silos, tmp_path: Path
) -> None:
    shared = {"shared": True} if name == "fedkseed" else {}
    privacy = (CLIENT if level else {}) | {"secure": {}}
    method = METHODS[name] | shared | {"weighting": "uniform"}
    run = silos.run(method, rounds=3, model=VIEWS.get(name, {}), privacy=privacy)
    estimated_as_trained(run, tmp_path / "run")
