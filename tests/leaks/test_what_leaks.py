"""The audit of tiny runs: what leaks is found, what is noised is not, and what cannot be audited is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from silos import Silos
from test_cli import refused, thinwire
from tiny import tiny_folder

from thinwire import assemble, config
from thinwire.config import ConfigError, Run
from thinwire.core import Method
from thinwire.keys import Key
from thinwire.leaks import Audit, Row, Size
from thinwire.leaks.audit import check
from thinwire.leaks.canaries import drawn, guessed_right
from thinwire.model.errors import ModelError
from thinwire.privacy.secrets import SystemSecrets

RECORD = {"level": "record", "epsilon": 1.0, "delta": 1e-4, "clip": 0.5}
CLIENT = {"level": "client", "epsilon": 1.0, "delta": 1e-4, "clip": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg", "lr": 3e-3, "steps": 2, "batch_size": 4},
    "fedkseed": {"name": "fedkseed", "seeds": 64, "lr": 2e-4, "eps": 1e-3, "steps": 3, "batch_size": 4, "queries": 2},
    "feedsign": {"name": "feedsign", "lr": 2e-3, "eps": 1e-3, "steps": 4, "batch_size": 4},
    "onebit": {"name": "onebit", "lr": 1e-2, "steps": 4, "batch_size": 4},
}
STRONG = {"name": "fedavg", "lr": 5e-3, "steps": 20, "batch_size": 8}
VIEWS = {"onebit": {"view": {"kind": "tied", "numbers": 500, "targets": ["q_proj", "v_proj"]}}}
OPEN = {"choices": None}
FEW = Size(candidates=4, tries=2, canaries=0)


class Coins(SystemSecrets):
    """Half of the canaries are in, every time the same ones."""

    def sampled(self, count: int, rate: float) -> NDArray[np.int64]:
        return np.arange(0, count, 2) if rate == 0.5 else super().sampled(count, rate)


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    """One client alone."""
    return Silos.make(tmp_path_factory.mktemp("one"), sites=1)


def run_of(silos: Silos, name: str, **fields: Any) -> Run:
    return silos.run(METHODS[name], model=VIEWS.get(name, {}), data=OPEN, **fields)


def audited(run: Run, size: Size = FEW) -> list[Row]:
    return Audit(run, size, Coins())()


def test_of_scalars_the_whole_update_is_rebuilt_and_noise_of_a_record_hides_it(silos: Silos) -> None:
    plain, private = audited(run_of(silos, "fedkseed", privacy=RECORD | {"noise": 20.0}))
    assert plain.found.update.error < 1e-5
    assert plain.found.update.cosine > 1 - 1e-9
    assert plain.found.guess is not None
    assert plain.found.guess.first == 2  # of a quarter by chance
    assert private.found.update.error > 1
    assert private.found.update.cosine < 0.99


def test_with_privacy_of_a_client_the_server_sees_all_and_others_do_not(silos: Silos) -> None:
    plain, server, others = audited(run_of(silos, "fedavg", privacy=CLIENT))
    assert plain.found.update.error < 1e-6
    assert server.found.update.error < 1e-6
    assert others.found.update.error > 1
    assert abs(others.found.update.cosine) < 0.2


MASKED: dict[str, Any] = {"weighting": "uniform"}


@pytest.mark.parametrize(
    ("privacy", "names", "hidden"),
    [
        ({}, ["server and all others in league"], [False]),
        (RECORD, ["server, without privacy", "server and all others in league, as asked"], [False, True]),
        (CLIENT, ["server, without privacy", "server and all others, as asked"], [False, True]),
    ],
    ids=["masks alone", "record", "client"],
)
def test_under_masks_the_server_is_taken_to_have_all_others_in_league(
    privacy: dict[str, Any], names: list[str], hidden: list[bool], silos: Silos
) -> None:
    run = silos.run(METHODS["fedavg"] | MASKED, data=OPEN, privacy=privacy | {"secure": {}})
    rows = audited(run, Size(candidates=4, tries=2, canaries=8))
    assert [row.view.name for row in rows] == names
    assert [row.found.update.error > 1 for row in rows] == hidden
    assert all(row.leak is not None for row in rows)


def test_a_reply_of_one_bit_a_number_gives_the_update_in_part(silos: Silos) -> None:
    (row,) = audited(run_of(silos, "onebit"))
    assert 0.1 < row.found.update.error < 0.9
    assert 0.4 < row.found.update.cosine < 0.99


def test_the_update_is_what_the_client_learnt_and_not_what_the_server_makes_of_it(silos: Silos) -> None:
    (row,) = audited(run_of(silos, "feedsign"))  # each step counts with its sign alone, and the client walks by it too
    assert row.found.update.error < 1e-5


def test_tokens_are_read_off_an_embedding_that_is_trained(one: Silos, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "untied", tie_word_embeddings=False)
    path = {"path": str(tmp_path / "untied")}
    plain, private = audited(one.run(METHODS["fedavg"], model=path, data=OPEN, privacy=RECORD))
    assert plain.found.tokens == (1.0, 1.0)
    assert private.found.tokens is not None
    assert private.found.tokens.recall < 0.5


def test_without_the_embedding_no_token_is_read(silos: Silos) -> None:
    (row,) = audited(run_of(silos, "onebit"), Size(candidates=4, tries=1, rows=2, canaries=0))
    assert row.found.tokens is None
    assert row.found.guess is not None
    assert row.found.guess.chance == 0.5


def test_canaries_that_are_learnt_by_heart_show_and_strong_noise_hides_them(one: Silos) -> None:
    run = one.run(STRONG, rounds=3, data=OPEN, privacy=RECORD)
    plain, private = audited(run, Size(candidates=4, tries=1, canaries=24, guesses=24))
    assert plain.leak is not None
    assert private.leak is not None
    assert plain.leak.claimed is None
    assert plain.leak.members == 12
    assert min(score.right for score in plain.leak.scores.values()) >= 19
    assert 0.5 < plain.leak.epsilon <= plain.leak.most
    assert private.leak.claimed is not None
    assert private.leak.claimed == pytest.approx(1.0, abs=0.1)
    assert private.leak.epsilon < min(plain.leak.epsilon, private.leak.claimed)
    assert not private.leak.beyond


def test_a_run_that_forgets_its_noise_is_found_out(one: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: SystemSecrets, shape: Any, scale: float) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)

    monkeypatch.setattr(SystemSecrets, "normal", nothing)
    private = RECORD | {"epsilon": 0.05, "clip": 50.0}
    (tmp_path / "run.toml").write_text(one.run(STRONG, rounds=3, data=OPEN, privacy=private).to_toml())
    words = ("--candidates", "4", "--tries", "1", "--canaries", "24", "--guesses", "24")
    result = thinwire("audit-privacy", tmp_path / "run.toml", *words, "--json", tmp_path / "found.json")
    assert result.code == 1
    assert "and the run promises 0.0" in result.err
    assert result.err.count("\n") == 1
    assert "14 visits of one client, then 2 runs of 3 rounds with 24 canaries: 6 visits, and 384 rows" in result.out
    assert "epsilon is at least (95 %)" in result.out
    plain, broken = json.loads((tmp_path / "found.json").read_text())["views"]
    assert broken["canaries"]["beyond"]
    assert broken["canaries"]["epsilon"] > broken["canaries"]["claimed"]
    assert plain["canaries"]["claimed"] is None


def test_guesses_are_about_the_highest_and_the_lowest_scores() -> None:
    coins = np.array([True, False, True, False, True, False])
    scores = np.array([9.0, 1.0, 8.0, 2.0, 5.0, 5.5])
    assert guessed_right(scores, coins, 4) == 4
    assert guessed_right(scores, coins, 6) == 4
    assert guessed_right(-scores, coins, 4) == 0


def test_canaries_are_rows_that_nobody_has(silos: Silos) -> None:
    run = silos.run(METHODS["fedavg"])
    start = assemble.begin(*assemble.prepared(run))
    data = assemble.clients_data(start.run, start.rows, start.net)[0]
    found = drawn(data, start.net, 40, Key.root(1))
    assert len({e.prompt for e in found} | {e.prompt for e in data.examples}) == 40 + len({*data.examples})
    assert {e.choice for e in found} == {0, 1}
    assert {len(e.prompt) for e in found} <= {len(e.prompt) for e in data.examples}
    assert found == drawn(data, start.net, 40, Key.root(1)) != drawn(data, start.net, 40, Key.root(2))


@dataclass(frozen=True)
class Nothing:
    """A reply without what was learnt."""

    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})


class AtHome(Method):
    """All that is learnt stays with the client."""

    name: str = "athome"
    Down, Up, State = Nothing, Nothing, Nothing


@pytest.mark.parametrize(
    ("size", "line"),
    [
        (Size(canaries=7), "--canaries: 7 are too few for any bound; 8 at least, or 0 for none"),
        (Size(canaries=8, guesses=9), "--guesses: 9 about 8 canaries; 6 at least, one each"),
        (Size(candidates=4, rows=4), "--rows: 4 of 4 candidates; 1 to 4, and fewer than there are"),
    ],
)
def test_sizes_that_show_nothing_are_refused(size: Size, line: str, silos: Silos) -> None:
    with pytest.raises(ConfigError) as caught:
        check(run_of(silos, "fedavg"), size)
    assert str(caught.value) == line


def test_runs_that_cannot_be_audited_are_refused_in_a_line(silos: Silos, tmp_path: Path) -> None:
    tight = run_of(silos, "fedavg", privacy=RECORD | {"delta": 0.03})
    with pytest.raises(ConfigError, match=r"^privacy.delta: 0.03 is not below one in 36 rows, canaries counted$"):
        Audit(tight, Size(canaries=20))
    (tmp_path / "tight.toml").write_text(tight.to_toml())
    nowhere = tmp_path / "nowhere" / "found.json"
    assert refused("audit-privacy", tmp_path / "tight.toml", "--json", nowhere) == (
        f"--json: there is no folder {nowhere.parent}"
    )
    run = run_of(silos, "fedavg", federation={"sites": ["north", "south", "west"]})
    (tmp_path / "run.toml").write_text(run.to_toml())
    assert refused("audit-privacy", tmp_path / "run.toml").startswith("federation.sites: the audit runs in one process")
    with pytest.raises(ConfigError, match=r"^method: of what a client of athome learns nothing leaves it"):
        check(run.model_copy(update={"method": AtHome(), "federation": None}), FEW)
    pairs = run.model_copy(update={"federation": None, "data": config.Data(path="pairs.jsonl", loss="dpo")})
    with pytest.raises(ConfigError, match=r'^data\.loss: the audit makes canaries of one answer, and rows of "dpo"'):
        check(pairs, FEW)
    lora: dict[str, Any] = {"view": {"kind": "lora", "rank": 2, "targets": ["q_proj"], "keep": ["*"]}}
    with pytest.raises(ModelError, match="all that is trained would stay with the clients"):
        audited(silos.run(METHODS["onebit"], model=lora))
    lora["view"].pop("keep")
    with pytest.raises(ConfigError, match="method: flora moves weights that its view freezes"):
        check(silos.run({"name": "flora"}, model=lora), FEW)
    with pytest.raises(ConfigError, match="method: a client of fedcybgd trains a model of its own"):
        check(silos.run({"name": "fedcybgd"}), FEW)
