"""The column of NVIDIA FLARE: every row ends there where it ends in one process, with the same frames."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="comes with: pip install 'thinwire[nvflare]'")

from flare import federate
from rows import MODELS, ROWS, model_of
from silos import Silos, in_one_federation, in_process, logged, state_of, visits

from thinwire.config import Run
from thinwire.config.schema import without_none
from thinwire.runtime import course

# rows that between them hold versions, memory of their own, LoRA, half precision, and large frames
SHORT = ("fedit", "fedkseed-paper-pro", "gradualdiff-residue")


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def run_of(silos: Silos, row: str, rounds: int = 2) -> Run:
    """The row as a run file, whose large frames travel in pieces."""
    method = without_none(ROWS[row].method.model_dump(mode="json"))
    return silos.run(method, rounds, model=MODELS[model_of(row)], federation={"chunk_bytes": 50_000})


@pytest.mark.parametrize("row", [row if row in SHORT else pytest.param(row, marks=pytest.mark.long) for row in ROWS])
def test_a_row_over_the_transport_and_the_workers(
    row: str, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls, pieces and workers are ours; only the engine's processes, and what lies between them, are left out."""
    run = run_of(silos, row, rounds=3)
    job, proxies, _ = federate(silos, run, tmp_path / "there", chunk_bytes=50_000)
    course.train(job)
    frames = in_process(silos, run, tmp_path / "here", monkeypatch)
    assert logged([tmp_path / "there" / "at" / name for name in job.names]) == frames
    assert max(max(proxy.bodies) for proxy in proxies) <= 50_000
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")
    assert visits(tmp_path / "there") == visits(tmp_path / "here")


def test_some_rows_in_one_federation_on_flare(silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_federation(silos, {row: run_of(silos, row) for row in SHORT}, tmp_path, "nvflare", monkeypatch)


@pytest.mark.long
def test_all_rows_in_one_federation_on_flare(silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_federation(silos, {row: run_of(silos, row) for row in ROWS}, tmp_path, "nvflare", monkeypatch)
