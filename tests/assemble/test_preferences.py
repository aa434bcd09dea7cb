"""Runs on preferences: under methods of every kind, and what does not go with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_encoder, tiny_folder

from thinwire import assemble, config
from thinwire.config import ConfigError
from thinwire.config.privacy import Privacy
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.keys import Key
from thinwire.runtime.course import Watch, train

TIED = {"view": {"kind": "tied", "numbers": 256, "rank": 2, "targets": ["q_proj", "v_proj"]}}
FEDKSEED = {"name": "fedkseed", "seeds": 64, "lr": 1e-3, "steps": 6, "batch_size": 4}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "first order": ({"name": "fedavg", "lr": 3e-3, "steps": 3, "batch_size": 4}, {}),
    "zeroth order": (FEDKSEED, {}),
    "zeroth order, both sides in a pass": ({**FEDKSEED, "together": True}, {}),
    "a bit a number": ({"name": "onebit", "lr": 0.1, "steps": 3, "batch_size": 4}, TIED),
    "private": ({"name": "onebit", "lr": 0.1, "steps": 3, "batch_size": 4}, TIED),
}
PRIVACY = {"level": "record", "epsilon": 1e4, "delta": 1e-3, "clip": 1.0, "noise": 0.2}
NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dpo") / "model")


def rows(lacking: int | None = None) -> assemble.Rows:
    """Two clients whose answers that agree are preferred, and a split of the same."""
    each = [
        Row({"prompt": f"{name}?", "chosen": f"yes, {name}", "rejected": "no, never"}, "pairs.jsonl", i)
        for i, name in enumerate(NAMES, 1)
    ]
    if lacking is not None:
        each[lacking - 1] = Row({"prompt": "a", "chosen": "b"}, "pairs.jsonl", lacking)
    return assemble.Rows({"north": each[:4], "south": each[4:]}, {"heldout": each[:4]})


def run_of(path: Path, method: dict[str, Any], model: dict[str, Any] | None = None, **data: Any) -> config.Run:
    table = {"path": "none", "template": "completion", "loss": "dpo", "beta": 0.5} | data
    return config.parse({"model": {"path": str(path), **(model or {})}, "data": table, "method": method, "rounds": 2})


@pytest.mark.parametrize("kind", RUNS)
def test_the_chosen_answers_gain(kind: str, model: Path, tmp_path: Path) -> None:
    method, view = RUNS[kind]
    run = run_of(model, method, view)
    if kind == "private":
        run = run.model_copy(update={"privacy": Privacy.model_validate(PRIVACY)})
    start = assemble.begin(*assemble.prepared(run, rows()))
    summary = train(start.job(tmp_path, Watch()))
    (before,), (after,) = summary["first"], summary["final"]
    assert (before["loss"], before["accuracy"]) == (pytest.approx(math.log(2), abs=1e-9), 0)
    assert after["loss"] < before["loss"] - 1e-3
    assert after["accuracy"] >= 0.75


def test_a_references_number_is_measured_once_and_stays(model: Path, tmp_path: Path) -> None:
    """No pass is made under the start model after the first step: there is no second model to make it with."""
    run = run_of(model, RUNS["first order"][0])
    start = assemble.begin(*assemble.prepared(run, rows()))
    job = start.job(tmp_path, Watch())
    first = [e.reference for data in job.clients for e in data.examples]
    fresh = assemble.clients_data(run, rows(), assemble.net_of(run))
    train(job)
    assert [e.reference for data in job.clients for e in data.examples] == first
    assert [e.reference for data in fresh for e in data.examples] == first
    moved = assemble.clients_data(run, rows(), start.net)
    assert not {e.reference for data in moved for e in data.examples} & {*first}


def test_a_rejected_answer_of_ones_own(model: Path) -> None:
    own = {"template": "plain", "prompt": "{prompt} ", "answer": "{chosen}", "rejected": "{rejected}"}
    run, method = run_of(model, FEDKSEED, **own), run_of(model, FEDKSEED)
    net = assemble.net_of(run)
    (mine, _), (theirs, _) = (assemble.clients_data(each, rows(), net) for each in (run, method))
    assert [e.rejected for e in mine.examples] == [e.rejected for e in theirs.examples]
    assert mine.examples[0].prompt == (*theirs.examples[0].prompt, ord(" "))
    assert mine.beta == 0.5
    with pytest.raises(ConfigError, match=r"^data\.rejected: .* names no \{column\}$"):
        assemble.clients_data(run_of(model, FEDKSEED, **{**own, "rejected": "no"}), rows(), net)


@pytest.mark.parametrize("method", [{"name": "fedcybgd", "blocks": 2}, {"name": "feddm"}])
def test_methods_that_do_not_fit_are_refused(method: dict[str, Any], model: Path) -> None:
    run = run_of(model, method)
    with pytest.raises(ConfigError, match=rf"^data\.(loss|choices): [^\n]*{method['name']}[^\n]*$"):
        assemble.clients_data(run, rows(), assemble.net_of(run))


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    run = run_of(tiny_encoder(tmp_path / "encoder"), {"name": "fedavg"})
    for refuse in (lambda: assemble.prepared(run, rows()), lambda: assemble.net_of(run)):
        with pytest.raises(
            ConfigError, match=r'^data\.loss: "dpo" is of answers in words, and [^\n]* is a classifier$'
        ):
            refuse()


def test_a_row_without_a_rejected_answer_is_named(model: Path) -> None:
    run = run_of(model, FEDKSEED)
    with pytest.raises(DataError, match=r"^pairs\.jsonl:6: field 'rejected' is missing \(present: prompt, chosen\)$"):
        assemble.clients_data(run, rows(lacking=6), assemble.net_of(run))


def test_a_row_beyond_the_context_is_named_before_it_is_measured(model: Path) -> None:
    run = run_of(model, FEDKSEED, max_length=4096)
    held = rows()
    held.clients["north"].append(Row({"prompt": "a" * 1500, "chosen": "b", "rejected": "c"}, "pairs.jsonl", 9))
    with pytest.raises(DataError, match=r"^pairs\.jsonl:9: the row has 1502 tokens, and the context of"):
        assemble.clients_data(run, held, assemble.net_of(run))


def test_rejected_answers_are_part_of_what_a_run_goes_on_with(model: Path, tmp_path: Path) -> None:
    run, found = run_of(model, FEDKSEED), []
    for answer in ("no, never", "not at all"):
        held = rows()
        held.clients["south"][0] = Row({**held.clients["south"][0].fields, "rejected": answer}, "pairs.jsonl", 5)
        start = assemble.begin(*assemble.prepared(run, held))
        found.append(assemble.fingerprints(start.job(tmp_path, Watch())))
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["rows"] != found[1]["rows"]


def test_a_net_without_weights_shows_rows_and_measures_none(model: Path) -> None:
    run = run_of(model, {"name": "fedavg"})
    (data, _) = assemble.clients_data(run, rows(), assemble.net_of(run, hollow=True))
    assert [e.reference for e in data.examples] == [None] * 4
    assert next(data.batches(Key.root(0), 2)).reference is None
