"""Sources of every kind: files by their ending, folders, saved Hugging Face data sets, names."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from tiny import tiny_rows, write_jsonl

from thinwire.data.errors import DataError
from thinwire.data.hub import Place, place_of
from thinwire.data.source import is_folder_of_files, read, read_clients

GOOD = b'{"a": 1}\n'


def put(folder: Path, content: bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/whole, a data set; folder/parts, one of two splits, with a column of class labels."""
    folder = tmp_path_factory.mktemp("saved")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    train = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [1, 0, 1]}, features=features)
    test = datasets.Dataset.from_dict({"text": ["w"], "label": [-1]}, features=features)
    train.save_to_disk(folder / "whole")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "parts")
    return folder


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = tiny_rows(6)
    fields = [dict(row.fields) for row in rows]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "rows.txt", rows)
    parquet.write_table(pyarrow.Table.from_pylist(fields), tmp_path / "rows.parquet")
    for name, separator in (("rows.csv", ","), ("rows.TSV", "\t")):
        lines = [separator.join(row.values()) for row in ({name: name for name in fields[0]}, *fields)]
        (tmp_path / name).write_text("\n".join(lines))
    for path in sorted(tmp_path.iterdir()):
        assert [dict(row.fields) for row in read(str(path))] == fields, path


def test_a_saved_data_set_is_read_with_the_names_of_its_labels(saved: Path) -> None:
    for source in (f"{saved}/whole", f"{saved}/parts", f"{saved}/parts@train"):
        rows = read(source)
        assert [(row.fields["text"], row.fields["label"], row.line) for row in rows] == [
            ("x", "good", 1),
            ("y", "bad", 2),
            ("z", "good", 3),
        ]
        assert not is_folder_of_files(source)
    (row,) = read(f"{saved}/parts@test")
    with pytest.raises(DataError, match=r"parts@test:1: field 'label' is null$"):
        row.text("label")


def test_a_saved_data_set_that_cannot_be_used(saved: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "dataset_info.json").write_text("{")
    for source, problem in (
        (f"{saved}/parts@dev", "there is no split 'dev'; there are: train, test (write NAME@SPLIT)"),
        (f"{saved}/whole@train", f"{saved}/whole has no splits"),
        (str(broken), "cannot be read ("),
    ):
        with pytest.raises(DataError) as caught:
            read(source)
        assert str(caught.value).startswith(f"{source}: {problem}")
        assert "\n" not in str(caught.value)


def test_what_may_be_the_name_of_a_data_set() -> None:
    assert place_of("tatsu-lab/alpaca") == Place("tatsu-lab/alpaca", None, None, saved=False)
    assert place_of("glue:sst2@validation") == Place("glue", "sst2", "validation", saved=False)
    for source in ("a/b/c", "/rows", "rows here", "", "a@", "@a", "..", str(Path(__file__).parent)):
        assert place_of(source) is None, source


def test_a_name_that_nothing_has_is_one_line() -> None:
    with pytest.raises(DataError) as caught:  # the tests run without a hub
        read("nobody/nothing-of-that-name")
    start = "nobody/nothing-of-that-name: is no file or folder here, and no data set that can be loaded ("
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_a_folder_is_one_client_a_file(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a-1.jsonl", "a.jsonl", "ward.7.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "c.csv").write_text("a\n1\n")
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "d.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05")
    clients = read_clients(tmp_path)
    assert list(clients) == ["a", "a-1", "b", "c", "d", "ward.7"]
    assert all(len(rows) == 1 for rows in clients.values())


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    file = put(tmp_path, GOOD)
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, problem in (
        (tmp_path / "none", "the folder does not exist"),
        (file, "is not a folder"),
        (empty, "the folder holds no .jsonl, .csv, .tsv or .parquet file (one is expected for each client)"),
    ):
        with pytest.raises(DataError) as caught:
            read_clients(folder)
        assert str(caught.value) == f"{folder}: {problem}"


def test_a_client_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError) as caught:
        read_clients(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'b.jsonl'}: the file holds no row"


def test_two_files_of_one_client_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError) as caught:
        read_clients(tmp_path)
    assert str(caught.value) == f"{tmp_path}: a.csv and a.jsonl would be the same client"
