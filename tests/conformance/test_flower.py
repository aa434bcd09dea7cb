"""The Flower column of the matrix: every row ends on Flower where it ends in one process, with the same frames."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from grid import entries, federate
from rows import MODELS, ROWS, model_of
from silos import Frames, Silos, in_one_federation, in_process, state_of, visits

from thinwire.config import Run
from thinwire.config.schema import without_none
from thinwire.runtime import course

# rows that between them hold versions, memory of their own, a hollow model, LoRA, half precision, and large frames
SHORT = {"fedit", "fedkseed-paper-pro", "gradualdiff-residue", "fedcybgd"}


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def run_of(silos: Silos, row: str, rounds: int = 2) -> Run:
    """The row as a run file."""
    method = without_none(ROWS[row].method.model_dump(mode="json"))
    return silos.run(method, rounds, model=MODELS[model_of(row)])


@pytest.mark.parametrize("row", [row if row in SHORT else pytest.param(row, marks=pytest.mark.long) for row in ROWS])
def test_a_row_over_the_transport_and_the_workers(
    row: str, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages, pieces and workers are Flower's and ours; only the engine's processes are left out."""
    run = run_of(silos, row, rounds=3)
    job, _, _ = federate(silos, run, tmp_path / "there", chunk_bytes=50_000)
    course.train(job)
    frames = in_process(silos, run, tmp_path / "here", monkeypatch)
    logged: Frames = {}
    for name in job.names:
        for line in entries(tmp_path / "there", name):
            key = (line["round"], line["client"], line["direction"])
            logged.setdefault(key, []).append((line["bytes"], line["sha256"]))
    assert logged == frames
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")
    assert visits(tmp_path / "there") == visits(tmp_path / "here")


@pytest.mark.long
def test_all_rows_in_one_federation_on_flower(silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_federation(silos, {row: run_of(silos, row) for row in ROWS}, tmp_path, "flower", monkeypatch)
