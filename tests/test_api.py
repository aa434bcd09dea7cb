"""The Python API, as a notebook uses it."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CHOICES, tiny_encoder, tiny_folder, tiny_model, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, BertForSequenceClassification

import thinwire
from thinwire import FedAvg, FedKSeed, Uniform, api, federate
from thinwire.config import ConfigError
from thinwire.data.errors import DataError
from thinwire.methods import METHODS
from thinwire.records import read_records

DATA = {"prompt": "{input}: it was", "answer": " {output}", "choices": list(CHOICES)}
FAST: dict[str, Any] = {"lr": 3e-3, "steps": 2, "batch_size": 4}


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in tiny_rows(count, seed, closed=True)]


CLIENTS = {"north": rows(12, 1), "south": rows(9, 2)}


def test_a_live_model_is_trained_in_a_copy(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    result = federate(model, CLIENTS, FedAvg(**FAST), 2, tokenizer=tiny_tokenizer(), data=DATA, eval={"every": 1})
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in result.model.named_parameters())
    assert result.summary["final"][0]["loss"] < result.summary["first"][0]["loss"]
    saved = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "out") / "model")
    for name, p in result.model.named_parameters():
        assert torch.equal(p, saved.get_parameter(name))
    with pytest.raises(ConfigError, match="is there already"):
        result.save(tmp_path / "out")
    folder = result.folder
    assert (folder / "rounds.jsonl").exists()
    del result
    assert not folder.exists()


def test_the_same_call_gives_the_same_and_its_records_are_tables(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path / "m")
    method = FedKSeed(lr=1e-3, steps=3, batch_size=2, seeds=16)
    one, two = (
        federate(path, list(CLIENTS.values()), method, 3, cohort=Uniform(n=1), data=DATA, folder=tmp_path / name)
        for name in "ab"
    )
    assert one.summary["sha256"] == two.summary["sha256"]
    assert len(one.rounds) == 3
    assert len(one.evals) == 2
    if importlib.util.find_spec("pandas") is not None:
        assert one.rounds["bytes_up"].sum() == one.summary["bytes_up"]
        assert list(one.evals["split"]) == ["heldout", "heldout"]
        assert set(one.rounds["name"]) <= {"client-0", "client-1"}
        assert "samples" not in one.evals
    with pytest.raises(ConfigError, match="is there already"):
        federate(path, CLIENTS, method, 1, data=DATA, folder=tmp_path / "a")


def test_who_counts_how_much_is_an_argument(tmp_path: Path) -> None:
    path, shares = tiny_folder(tmp_path / "m"), {"north": 0.8, "south": 0.2}
    weights = {"by": "table", "table": shares, "cap": 0.7}
    found = federate(path, CLIENTS, FedAvg(**FAST), 1, data=DATA, weights=weights)
    (record,) = read_records(found.folder / "rounds.jsonl")
    assert {line["name"]: line["share"] for line in record["clients"]} == pytest.approx({"north": 0.7, "south": 0.3})
    assert not (found.folder / "audit.jsonl").exists()


def test_without_pandas_records_are_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_folder(tmp_path / "m")
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    result = federate(path, CLIENTS, "fedavg", 1, data=DATA, heldout=rows(4, 9), lora={"rank": 2})
    assert [row["name"] for row in result.rounds] == ["north", "south"]
    assert result.evals[0]["rows"] == 4
    assert result.summary["parameters"] < 5000


def test_datasets_and_frames_are_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    pandas = pytest.importorskip("pandas", reason="needs the package pandas")
    path = tiny_folder(tmp_path / "m")
    tables = [
        {"a": datasets.Dataset.from_list(CLIENTS["north"]), "b": pandas.DataFrame(CLIENTS["south"])},
        {"a": CLIENTS["north"], "b": CLIENTS["south"]},
    ]
    ends = [federate(path, table, FedAvg(**FAST), 1, data=DATA).summary["sha256"] for table in tables]
    assert ends[0] == ends[1]


def test_an_encoder_names_classes(tmp_path: Path) -> None:
    result = federate(tiny_encoder(tmp_path / "m"), CLIENTS, FedAvg(**FAST), 1)
    assert isinstance(result.model, BertForSequenceClassification)
    assert result.model.config.id2label == dict(enumerate(sorted(CHOICES)))
    assert result.summary["final"][0]["accuracy"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": []}, "clients: there are none"),
        ({"clients": {"a": [], "b": rows(3)}}, "clients: 'a' has no rows"),
        ({"clients": rows(3)}, "clients: is a list of rows"),
        ({"clients": [["x"]]}, "client client-0:1: the row is a text"),
        ({"clients": "x.jsonl"}, "clients: is a str"),
        ({"method": "fedx"}, "method.name: 'fedx' is not a method"),
        ({"rounds": 0}, "rounds: must be greater than"),
        ({"weights": {"cap": 0.3}}, "federation.weights.cap: 0.3 cannot hold in a round of 2 clients"),
        ({"weights": {"by": "size"}}, "federation.weights.by"),
        ({"eval": {"keep": "best"}, "heldout": 0}, "no rows are held out to show which round is better"),
        ({"data": {"promt": "x"}}, "data.promt: unknown field"),
        ({"model": 7}, "model: is a int"),
        ({"model": tiny_model()}, "tokenizer: missing"),
        ({"model": "nowhere/at all"}, "no model at nowhere/at all"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "none", "clients": CLIENTS, "method": "fedavg", "rounds": 1, "data": DATA}
    with pytest.raises((ConfigError, DataError, ValueError)) as caught:
        federate(**(given | change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", [False, True])
def test_a_cell_that_pandas_read_as_missing_is_named(whole: bool, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    text = "input,output\na,one\nb,\nc,NA\n" if whole else "input,output\na,1\nb,\nc,3\n"
    frame = pandas.read_csv(io.StringIO(text))
    data = {"prompt": "{input}:", "answer": " {output}"}
    model = tiny_folder(tmp_path / "model")
    for table in (frame, frame.convert_dtypes(), frame.to_dict("records")):
        with pytest.raises(DataError, match=r"^client b:2: field 'output' is null$"):
            federate(model, {"a": frame[:1], "b": table}, "fedavg", 1, data=data, heldout=rows(2))


def test_a_frame_is_rows_as_a_person_reads_it() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "count": [1, None],
            "share": [1.0, 2.0],
            "part": [0.5, None],
            "big": [1e300, None],
            "none": [None, float("nan")],
            "when": pandas.to_datetime(["2024-01-02", None]),
            "kind": pandas.Categorical(["x", None]),
            "list": [np.array(["x", "y"]), None],
            7: pandas.array([2**60, None], dtype="Int64"),
        }
    )
    one, two = api._read(frame, "x")
    assert one.fields == {
        "count": 1,
        "share": 1.0,
        "part": 0.5,
        "big": 1e300,
        "none": None,
        "when": pandas.Timestamp("2024-01-02"),
        "kind": "x",
        "list": ["x", "y"],
        "7": 2**60,
    }
    assert (one.text("count"), one.text("share")) == ("1", "1.0")
    assert two.fields == dict.fromkeys(one.fields) | {"share": 2.0}
    with pytest.raises(DataError, match=r"^x: two columns are called 'a'$"):
        api._read(pandas.DataFrame([[1, 2]], columns=["a", "a"]), "x")


def test_the_package_exports_all_methods_and_imports_no_torch() -> None:
    for cls in METHODS.values():
        assert getattr(thinwire, cls.__name__) is cls
    assert {"federate", "FedKSeed"} <= set(dir(thinwire))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        thinwire.nothing  # noqa: B018
    code = "import sys, thinwire; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0
