"""Checkpoints: whole or not there, the last two kept, a damaged one passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from thinwire.errors import Damaged
from thinwire.runtime import checkpoint
from thinwire.runtime.checkpoint import Progress
from thinwire.wire import Stale, frame


@dataclass(frozen=True)
class State:
    scalars: list[float]
    one: Tensor
    weights: Mapping[str, Tensor]
    maybe: Mapping[str, Tensor] | None


def state(value: float) -> State:
    table = {"z": torch.full((3,), value, dtype=torch.bfloat16), "a": torch.tensor(value)}
    return State([float(value), 0.5], torch.full((2, 2), value), table, None)


def progress(round: int, finished: bool = False) -> Progress:
    return Progress(round, {"3": "0" * 32}, 10 * round, 20 * round, 0.25 * round, 2**40, finished)


@pytest.fixture(params=["bytes", "file"], autouse=True)
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "SPOOL_ABOVE", -1 if request.param == "file" else 1 << 24)


def fill(folder: Path, rounds: int) -> None:
    for round in range(1, rounds + 1):
        checkpoint.write(folder, state(round), progress(round))


def value_of(folder: Path) -> float | None:
    """Which state is read; all its parts must belong together."""
    found = checkpoint.read(folder, State)
    if found is None:
        return None
    got, at = found.state, found.progress
    assert got.scalars == [at.round, 0.5]
    assert at == progress(at.round)
    assert got.one.tolist() == [[at.round] * 2] * 2
    assert list(got.weights) == ["z", "a"]
    assert got.weights["z"].dtype == torch.bfloat16
    assert {name: tensor.flatten()[0].item() for name, tensor in got.weights.items()} == {"z": at.round, "a": at.round}
    assert got.maybe is None
    return at.round


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "state"
    assert checkpoint.read(folder, State) is None
    assert checkpoint.rounds(folder) == []
    checkpoint.write(folder, state(1), progress(1))
    assert value_of(folder) == 1
    assert sorted(path.name for path in (folder / "round-000001").iterdir()) == ["progress.json", "state.frame"]


def test_progress_returns_whole(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(2), progress(2, finished=True))
    found = checkpoint.read(tmp_path, State)
    assert found is not None
    assert found.progress == progress(2, finished=True)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["round-000003", "round-000004"]
    assert checkpoint.rounds(tmp_path) == [3, 4]
    assert value_of(tmp_path) == 4


def test_rounds_are_numbers(tmp_path: Path) -> None:
    for round in (999_999, 1_000_000):
        checkpoint.write(tmp_path, state(round % 1000), progress(round))
    assert checkpoint.rounds(tmp_path) == [999_999, 1_000_000]


def test_a_round_written_again_replaces(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    checkpoint.write(tmp_path, state(9), progress(2))
    found = checkpoint.read(tmp_path, State)
    assert found is not None
    assert found.state.scalars == [9, 0.5]
    assert checkpoint.rounds(tmp_path) == [1, 2]


def damage(at: Path, how: str) -> None:
    frame_file, progress_file = at / "state.frame", at / "progress.json"
    whole = frame_file.read_bytes()
    match how:
        case "truncated":
            frame_file.write_bytes(whole[:-3])
        case "one bit":
            frame_file.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
        case "empty":
            frame_file.write_bytes(b"")
        case "no frame":
            frame_file.unlink()
        case "no progress":
            progress_file.unlink()
        case "garbage":
            progress_file.write_bytes(b"\xff\xfe{")
        case "half":
            progress_file.write_text(progress_file.read_text()[:20])
        case "another form":
            progress_file.write_text("[1, 2]")
        case "null":
            progress_file.write_text("null")
        case "a field less":
            progress_file.write_text(json.dumps({"round": 2}))
        case "an empty folder":
            shutil.rmtree(at)
            at.mkdir()
        case "not a folder":
            shutil.rmtree(at)
            at.write_text("")


DAMAGES = ["truncated", "one bit", "empty", "no frame", "no progress", "garbage", "half", "another form", "null"]
DAMAGES += ["a field less", "an empty folder", "not a folder"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_one_is_passed_over(tmp_path: Path, how: str) -> None:
    fill(tmp_path, 2)
    damage(tmp_path / "round-000002", how)
    assert value_of(tmp_path) == 1
    found = checkpoint.read(tmp_path, State)
    assert found is not None
    assert [reason.split(":")[0] for reason in found.passed] == ["round 2"]


@pytest.mark.parametrize("how", DAMAGES)
def test_where_none_is_whole_it_is_reported_and_nothing_is_touched(tmp_path: Path, how: str) -> None:
    fill(tmp_path, 2)
    for round in (1, 2):
        damage(tmp_path / f"round-00000{round}", how)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(Damaged, match=r"no checkpoint is whole .round 2: .*; round 1: ") as error:
        checkpoint.read(tmp_path, State)
    assert "\n" not in str(error.value)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_state_of_another_method_is_damage(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with pytest.raises(Damaged, match="no checkpoint is whole"):
        checkpoint.read(tmp_path, Stale)


def test_a_number_changed_in_the_progress_is_seen(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    file = tmp_path / "round-000002" / "progress.json"
    for old, new in (('"bytes_up": 40', '"bytes_up": 41'), ('"round": 2', '"round": 1')):
        whole = file.read_text()
        file.write_text(whole.replace(old, new))
        assert file.read_text() != whole
        assert value_of(tmp_path) == 1
        file.write_text(whole)
    assert value_of(tmp_path) == 2


HOSTILE = [
    {"held": []}, {"held": {"x": "0"}}, {"held": {"1": 5}}, {"held": {"9" * 5000: "0"}}, {"bytes_down": "many"},
    {"bytes_up": 1.5}, {"seconds": None}, {"seconds": float("nan")}, {"seconds": float("inf")}, {"round": True},
    {"memory": [1]}, {"memory": {"-1": 2}}, {"evals": "2"}, {"versions": "0" * 32}, {"best": 1.5}, {"best_loss": "low"},
    {"waited": None}, {"finished": 1}, {"more": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", HOSTILE, ids=str)
def test_a_progress_of_other_types_is_damage_also_without_a_digest(tmp_path: Path, fields: dict[str, Any]) -> None:
    fill(tmp_path, 2)
    file = tmp_path / "round-000002" / "progress.json"
    before = json.loads(file.read_text())
    del before["digest"]
    file.write_text(json.dumps(before | fields))
    found = checkpoint.read(tmp_path, State)
    assert found is not None
    assert found.progress.round == 1
    (reason,) = found.passed
    assert reason.startswith(f"round 2: progress.json: {next(iter(fields))}")
    assert "\n" not in reason
    assert len(reason) < 250


def test_a_progress_nested_beyond_all_depth_is_damage(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "round-000002" / "progress.json").write_text("[" * 100_000)
    assert value_of(tmp_path) == 1


def test_a_checkpoint_under_anothers_name_is_damage(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "round-000002").rename(tmp_path / "round-000003")
    assert value_of(tmp_path) == 1


def test_one_of_an_older_version_is_read(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    file = tmp_path / "round-000002" / "progress.json"
    fields = json.loads(file.read_text())
    for later in ("digest", "memory", "evals"):
        del fields[later]
    file.write_text(json.dumps(fields))
    assert value_of(tmp_path) == 2


def test_what_goes_with_a_checkpoint_is_checked_with_it(tmp_path: Path) -> None:
    fill(tmp_path, 2)

    def check(at: Progress) -> None:
        if at.round == 2:
            raise Damaged("the memory of client 3 is missing")

    found = checkpoint.read(tmp_path, State, check)
    assert found is not None
    assert (found.progress.round, found.passed) == (1, ("round 2: the memory of client 3 is missing",))


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 2)

    def broken(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "on_disk", broken)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.read(tmp_path, State)


def test_a_folder_half_written_is_ignored_and_written_over(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    shutil.copytree(tmp_path / "round-000001", tmp_path / "round-000002.part")
    (tmp_path / "round-000002.part" / "left.frame").write_bytes(b"half")
    assert checkpoint.rounds(tmp_path) == [1]
    assert value_of(tmp_path) == 1
    checkpoint.write(tmp_path, state(2), progress(2))
    assert value_of(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000001", "round-000002"]
    assert sorted(path.name for path in (tmp_path / "round-000002").iterdir()) == ["progress.json", "state.frame"]


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    (tmp_path / "versions").mkdir()
    fill(tmp_path, 3)
    assert {"clients", "versions"} <= {path.name for path in tmp_path.iterdir()}


def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 2)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.write(tmp_path, state(3), progress(3))
    assert checkpoint.rounds(tmp_path) == [1, 2]
    assert value_of(tmp_path) == 2


def test_tensors_outlive_their_checkpoint(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    found = checkpoint.read(tmp_path, State)
    assert found is not None
    shutil.rmtree(tmp_path)
    assert found.state.weights["z"].tolist() == [1, 1, 1]
    assert found.state.weights["a"].item() == 1
    assert found.state.one.sum().item() == 4
