"""What trackers receive: the records' numbers, once each, and nothing of anybody's rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import CHOICES, tiny_folder, tiny_rows, write_jsonl
from typer.testing import CliRunner

from thinwire import config, trackers
from thinwire.cli import app
from thinwire.config import ConfigError
from thinwire.runtime.course import Watch, read_records
from thinwire.trackers import Trackers, of_eval, of_round, trackers_of

ROUND = {
    "round": 3,
    "clients": [{"id": 0, "bytes_up": 1}, {"id": 1, "error": "lost"}],
    "bytes_down": 10,
    "bytes_up": 4,
    "seconds": 0.5,
    "peak_memory_bytes": 7,
    "metrics": {"loss": 1.5, "broken": math.nan},
}
EVAL = {"round": 3, "split": "heldout", "loss": 1.25, "accuracy": None, "samples": [{"prompt": "secret"}], "rows": 4}


class Listed:
    """A tracker that keeps what it receives."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self.logged.append((round, dict(values)))

    def close(self) -> None:
        self.closed += 1


def test_the_numbers_of_records_have_names() -> None:
    assert of_round(ROUND) == {
        "bytes/down": 10.0,
        "bytes/up": 4.0,
        "seconds": 0.5,
        "peak_memory_bytes": 7.0,
        "clients/answered": 1.0,
        "clients/dropped": 1.0,
        "train/loss": 1.5,
    }
    assert of_eval(EVAL) == {"heldout/loss": 1.25}


def test_all_trackers_and_the_watch_receive_all_and_are_closed_also_after_a_stop() -> None:
    class Counted(Watch):
        ends = 0

        def round_ends(self, record: dict[str, Any], left: float) -> None:
            self.ends += 1

    inner, several = Counted(), [Listed(), Listed()]

    def stopped() -> None:
        with Trackers(inner, several) as watch:
            watch.round_begins(3, 4, [0, 1])
            watch.round_ends(ROUND, 0.0)
            watch.evaluated(EVAL)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert inner.ends == 1
    for tracker in several:
        assert tracker.logged == [(3, of_round(ROUND)), (3, of_eval(EVAL))]
        assert tracker.closed == 1


def test_a_tracker_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"data": {"path": "x"}, "method": {"name": "fedavg"}, "track": {"to": ["wandb"]}}
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"track.to: wandb is not installed: pip install 'thinwire\[wandb\]'"):
        trackers.check(config.parse(tree))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("track")
    tiny_folder(folder / "model")
    write_jsonl(folder / "rows.jsonl", tiny_rows(24, closed=True))
    return folder


def ran(place: Path, folder: Path, name: str) -> list[dict[str, Any]]:
    """A run of two rounds that tracks to that name; the records of its rounds."""
    (folder / "run.toml").write_text(
        f"""
name = "tracked"
rounds = 2
threads = 1
model = {{ path = "{place / "model"}" }}
method = {{ name = "fedavg", steps = 1 }}
track = {{ to = ["{name}"], project = "ward" }}
[data]
path = "{place / "rows.jsonl"}"
clients = 2
heldout = 4
prompt = "{{input}}: it was"
answer = " {{output}}"
choices = {json.dumps(CHOICES)}
"""
    )
    done = CliRunner().invoke(app, ["run", str(folder / "run.toml"), "--out", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return read_records(folder / "run" / "rounds.jsonl")


def test_tensorboard_reads_back_what_was_recorded(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = ran(place, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    up = [(event.step, event.value) for event in events.Scalars("bytes/up")]
    assert up == [(record["round"], record["bytes_up"]) for record in records]
    assert [event.step for event in events.Scalars("heldout/accuracy")] == [0, 2]


def test_mlflow_reads_back_what_was_recorded(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    records = ran(place, tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "run" / "mlflow").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("ward").experiment_id])
    history = client.get_metric_history(run.info.run_id, "bytes/up")
    assert [(metric.step, metric.value) for metric in history] == [(r["round"], r["bytes_up"]) for r in records]
    assert run.data.params["method.steps"] == "1"
    assert run.info.status == "FINISHED"


def test_wandb_writes_an_offline_run(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    ran(place, tmp_path, "wandb")
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"heldout/loss" in written.read_bytes()


def test_a_run_without_trackers_has_none(tmp_path: Path) -> None:
    assert trackers_of(config.parse({"data": {"path": "x"}, "method": {"name": "fedavg"}}), tmp_path) == []
