"""What outlives a process: versions of weights, and the clients' own tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from thinwire.runtime.store import ClientMemories, ClientMemory, VersionStore, version_of, write_atomically
from thinwire.wire import LazyTensors


def weights(value: float) -> dict[str, Tensor]:
    return {"b.weight": torch.full((2, 3), value, dtype=torch.bfloat16), "a": torch.tensor(value)}


def put_in_turn(store: VersionStore, *values: float) -> list[str]:
    """Put several versions, each clearly later than the one before, whatever the clock of the file system."""
    versions = []
    for value in values:
        version = store.put(weights(value))
        for turn, earlier in enumerate([*versions, version]):
            path = store.folder / f"{earlier}.safetensors"
            if path.exists():
                os.utime(path, (turn, turn))
        versions.append(version)
    return versions


# versions


def test_a_version_is_the_content() -> None:
    one = weights(1.0)
    assert version_of(one) == version_of({name: tensor.clone() for name, tensor in one.items()})
    assert version_of(one) == version_of(dict(reversed(one.items())))
    assert version_of({"t": torch.ones(2, 3).T}) == version_of({"t": torch.ones(3, 2)})
    assert len(version_of({})) == 32
    others: list[dict[str, Tensor]] = [
        weights(2.0),
        {"a": one["a"]},
        {**one, "c": torch.empty(0)},
        {"a": one["a"], "b.Weight": one["b.weight"]},
        {**one, "b.weight": one["b.weight"].reshape(3, 2)},
        {**one, "b.weight": one["b.weight"].view(torch.int16)},
        {"a": torch.tensor(0.0)},
        {"a": torch.tensor(-0.0)},
    ]
    assert len({version_of(tensors) for tensors in [one, *others]}) == 1 + len(others)


def test_a_version_does_not_change_between_releases() -> None:
    assert (
        version_of({"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.tensor(1)})
        == "c537f70dcac192619d2c698dd394eca4"
    )


def test_what_is_put_is_got(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "not" / "yet")
    version = store.put(weights(1.0))
    assert version == version_of(weights(1.0))
    for holder in (store, VersionStore(store.folder)):  # a new process too
        got = holder.get(version)
        assert isinstance(got, LazyTensors)
        assert version_of(got) == version
        assert got["b.weight"].dtype == torch.bfloat16
        assert got["b.weight"].tolist() == [[1.0] * 3] * 2
        assert got["a"].shape == ()
        with pytest.raises(KeyError):
            got["c"]


def test_a_view_is_kept_as_what_it_shows(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    view = torch.arange(6.0).reshape(2, 3).T
    got = store.get(store.put({"view": view, "parameter": torch.nn.Parameter(torch.ones(1))}))
    assert got is not None
    assert torch.equal(got["view"], view)
    assert not got["parameter"].requires_grad


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = VersionStore(tmp_path, keep=3)
    versions = put_in_turn(store, 1, 2, 3, 4, 5)
    assert [store.get(version) is not None for version in versions] == [False, False, True, True, True]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_put_again_is_new_again(tmp_path: Path) -> None:
    store = VersionStore(tmp_path, keep=2)
    first, second = put_in_turn(store, 1, 2)
    assert store.put(weights(1)) == first
    assert len(list(tmp_path.iterdir())) == 2
    third = store.put(weights(3))
    assert [store.get(version) is not None for version in (first, second, third)] == [True, False, True]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_put_stays_even_if_the_clock_went_back(tmp_path: Path, keep: int) -> None:
    store = VersionStore(tmp_path, keep=keep)
    for value in (1, 2):
        os.utime(tmp_path / f"{store.put(weights(value))}.safetensors", (2**32, 2**32))
    assert store.get(store.put(weights(3))) is not None


@pytest.mark.parametrize("version", ["", "0" * 32, "0" * 31, "../x", "../" + "0" * 32, "/etc/passwd", "A" * 32, "\0"])
def test_an_unknown_or_malformed_version_is_none(tmp_path: Path, version: str) -> None:
    folder = tmp_path / "versions"
    store = VersionStore(folder)
    assert store.get(version) is None
    store.put(weights(1))
    write_atomically(tmp_path / "x.safetensors", weights(1))
    write_atomically(tmp_path / ("0" * 32 + ".safetensors"), weights(1))
    assert store.get(version) is None
    assert store.get(version_of(weights(1)) + "\n") is None


def test_a_file_half_written_is_not_a_version(tmp_path: Path) -> None:
    store = VersionStore(tmp_path, keep=1)
    version = version_of(weights(1))
    partial = tmp_path / f"{version}.safetensors.part"
    partial.write_bytes(b"half")
    assert store.get(version) is None
    other = store.put(weights(2))
    assert store.get(other) is not None
    assert store.put(weights(1)) == version  # the partial file is overwritten and renamed
    assert store.get(version) is not None
    assert [path.name for path in tmp_path.iterdir()] == [f"{version}.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_atomically(path, weights(1))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, weights(2))
    assert path.read_bytes() == before


# what is private to a client


def test_memory_is_there_in_a_later_round(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 1)
    assert dict(memory) == {}
    memory["residue"] = torch.ones(2, dtype=torch.bfloat16)
    memory["other"] = torch.zeros(1)
    memory.commit()
    later = ClientMemory(tmp_path, 5)
    assert sorted(later) == ["other", "residue"]
    assert later["residue"].dtype == torch.bfloat16
    assert later["residue"].tolist() == [1, 1]
    del later["other"]
    later.commit()
    assert list(ClientMemory(tmp_path, 6)) == ["residue"]
    assert len(ClientMemory(tmp_path, 5)) == 2  # round 5 is done over from what round 1 left


def test_memory_of_the_very_round_is_from_a_run_cut_off(tmp_path: Path) -> None:
    for round, value in ((1, 1.0), (2, 2.0), (3, 3.0)):
        memory = ClientMemory(tmp_path, round)
        memory["x"] = torch.tensor(value)
        memory.commit()
    assert [ClientMemory(tmp_path, round)["x"].item() for round in (2, 3, 4, 9)] == [1, 2, 3, 3]
    assert "x" not in ClientMemory(tmp_path, 1)
    again = ClientMemory(tmp_path, 3)
    again["x"] = again["x"] * 10
    again.commit()
    assert ClientMemory(tmp_path, 4)["x"].item() == 20


def test_what_is_not_committed_is_not_kept(tmp_path: Path) -> None:
    ClientMemory(tmp_path, 1)["x"] = torch.ones(1)
    assert "x" not in ClientMemory(tmp_path, 2)
    unchanged = ClientMemory(tmp_path, 2)
    assert len(unchanged) == 0
    unchanged.commit()
    assert list(tmp_path.iterdir()) == []


def test_memory_can_be_emptied(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 1)
    memory["x"] = torch.ones(1)
    memory.commit()
    second = ClientMemory(tmp_path, 2)
    second.clear()
    second.commit()
    assert dict(ClientMemory(tmp_path, 3)) == {}


def test_a_memory_half_written_is_ignored(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 1)
    memory["x"] = torch.ones(1)
    memory.commit()
    (tmp_path / "000002.safetensors.part").write_bytes(b"half")
    assert ClientMemory(tmp_path, 3)["x"].item() == 1
    ClientMemory.prune(tmp_path, 2)
    assert ClientMemory(tmp_path, 3)["x"].item() == 1


def test_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    for round in (9, 10, 100):
        memory = ClientMemory(tmp_path, round)
        memory["x"] = torch.tensor(round)
        memory.commit()
    assert [ClientMemory(tmp_path, round)["x"].item() for round in (10, 11, 100, 101)] == [9, 10, 10, 100]


@pytest.mark.parametrize(("oldest", "left"), [(0, [1, 3, 5]), (1, [1, 3, 5]), (3, [3, 5]), (4, [3, 5]), (9, [5])])
def test_pruning_keeps_what_a_checkpoint_needs(tmp_path: Path, oldest: int, left: list[int]) -> None:
    for round in (1, 3, 5):
        memory = ClientMemory(tmp_path, round)
        memory["x"] = torch.tensor(round)
        memory.commit()
    rounds = range(oldest + 1, 12)  # a run that goes on after the checkpoint of round `oldest` or a later one
    before = [int(ClientMemory(tmp_path, round).get("x", torch.tensor(0))) for round in rounds]
    ClientMemory.prune(tmp_path, oldest)
    assert [int(path.stem) for path in sorted(tmp_path.iterdir())] == left
    assert [int(ClientMemory(tmp_path, round).get("x", torch.tensor(0))) for round in rounds] == before
    ClientMemory.prune(tmp_path / "nobody", oldest)


def test_a_client_that_is_asked_twice_in_a_round_remembers_what_was_before_it(tmp_path: Path) -> None:
    memories = ClientMemories(tmp_path)
    for _ in range(2):  # the first reply was lost
        memory = memories.of(3, 1)
        assert "x" not in memory
        memory["x"] = memory.get("x", torch.zeros(1)) + 1
        memories.commit(memory, 3)
    assert "x" not in memories.of(4, 1)
    assert memories.of(3, 2)["x"].item() == 1
    assert "x" not in memories.of(4, 2)
    for _ in range(2):
        memory = memories.of(3, 2)
        memory["x"] = memory["x"] + 1
        memories.commit(memory, 3)
    assert memories.of(3, 3)["x"].item() == 2
    memories.prune(2)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == ["3/000002.safetensors"]


def test_what_a_run_that_was_cut_off_wrote_is_dropped_when_it_goes_on(tmp_path: Path) -> None:
    memories = ClientMemories(tmp_path)
    for round in (1, 3):
        memory = memories.of(0, round)
        memory["x"] = torch.tensor(float(round))
        memory.commit()
    again = ClientMemories(tmp_path)
    again.rewind(2)
    assert again.of(0, 4)["x"].item() == 1.0


def test_a_damaged_version_is_not_held_and_put_heals_it(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(9)}
    version = VersionStore(tmp_path).put(tensors)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        store = VersionStore(tmp_path)
        assert store.get(version) is None
        assert store.put(tensors) == version
        assert store.get(version)["a"].tolist() == [1.0] * 9


def test_a_store_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        VersionStore(tmp_path, keep=0)


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 1)
    memory["a"] = memory["b"] = torch.ones(2)
    memory.commit()
    assert ClientMemory(tmp_path, 2)["b"].tolist() == [1.0, 1.0]


def test_a_change_in_place_is_kept(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 1)
    memory["a"] = torch.ones(2)
    memory.commit()
    later = ClientMemory(tmp_path, 2)
    later["a"].add_(5)
    later.commit()
    assert ClientMemory(tmp_path, 3)["a"].tolist() == [6.0, 6.0]


def test_what_else_lies_in_the_folder_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "copy.safetensors").write_bytes(b"")
    memory = ClientMemory(tmp_path, 1)
    memory["a"] = torch.ones(2)
    memory.commit()
    ClientMemory.prune(tmp_path, 5)
    assert list(ClientMemory(tmp_path, 2)) == ["a"]
