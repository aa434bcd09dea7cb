"""Sources of every kind: files by their ending, folders, saved Hugging Face data sets, names."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import math
import os
import shutil
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import feather, parquet
from tiny import tiny_rows, write_jsonl

from thinwire.data.errors import DataError
from thinwire.data.huggingface import Place, place_of
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


def test_every_kind_of_file_in_a_folder_is_a_client(tmp_path: Path, saved: Path) -> None:
    text, fields = json.dumps({"a": "x"}) + "\n", {"a": "x"}
    for name in ("a.ndjson", "b.JSONL", "c.json", "É d.jsonl"):
        (tmp_path / name).write_text(text)
    (tmp_path / "e.json").write_text(json.dumps([fields], indent=2))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "g.CSV.BZ2").write_bytes(bz2.compress(b"a\nx\n"))
    (tmp_path / "h.tsv.zst").write_bytes(zstandard.compress(b"a\nx\n"))
    feather.write_feather(pyarrow.table({"a": ["x"]}), tmp_path / "i.arrow")
    shutil.copytree(saved / "whole", tmp_path / "j")
    (tmp_path / "k.jsonl").symlink_to(tmp_path / "a.ndjson")
    clients = read_clients(tmp_path)
    assert list(clients) == ["a", "b", "c", "e", "f", "g", "h", "i", "j", "k", "É d"]
    assert len(clients.pop("j")) == 3
    assert all([row.fields for row in rows] == [fields] for rows in clients.values())


def test_what_is_left_out_of_a_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    read_clients(tmp_path)
    assert not caplog.messages
    for name in ("b.xlsx", "c.jsonl.bak", ".d.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "west").mkdir()
    (tmp_path / "west" / "rows.jsonl").write_bytes(GOOD)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert list(read_clients(tmp_path)) == ["a"]
    assert caplog.messages == [
        f"{tmp_path}: no clients, left out: .d.jsonl (hidden), b.xlsx (no kind of file that is read), c.jsonl.bak (no "
        "kind of file that is read), pipe.jsonl (no file), west (a folder)"
    ]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"one is expected for each client\); it holds .*west \(a folder\)$"):
        read_clients(tmp_path)


def test_a_part_of_a_data_set_is_reported_as_a_client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / f"{name}.parquet")
    assert len(read_clients(tmp_path)) == 2
    assert caplog.messages == [
        f"{tmp_path}: train-00000-of-00002 is a part of a data set by its name; each part is a client here"
    ]


def test_clients_that_cannot_be_named_or_found_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file or directory\)"):
        read_clients(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    for pair in (("a.jsonl", "a.jsonl.gz"), ("a.JSONL", "a.jsonl")):
        for name in pair:
            (tmp_path / name).write_bytes(GOOD)
        with pytest.raises(DataError, match=f"{pair[0]} and {pair[1]} would be the same client"):
            read_clients(tmp_path)
        for name in pair:
            (tmp_path / name).unlink()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_bytes(GOOD)
    with pytest.raises(DataError, match=r"the name of \\udcff is not UTF-8"):
        read_clients(tmp_path)


def test_columns_beside_may_hold_anything(tmp_path: Path) -> None:
    day = datetime.date(2024, 1, 2)
    rows = {
        "a": ["x"],
        "day": [day],
        "price": [Decimal("1.50")],
        "raw": [b"\x00"],
        "in": [{"at": day}],
        "n": [math.nan],
    }
    picture = {"bytes": b"no picture", "path": None}
    kinds = datasets.Dataset.from_dict(rows).cast_column("n", datasets.Value("float32"))
    kinds = kinds.add_column("image", [picture], feature=datasets.Image())
    kinds.save_to_disk(tmp_path / "set")
    (row,) = read(str(tmp_path / "set"))
    assert row.fields == {name: value for name, (value,) in rows.items()} | {"n": None, "image": picture}


def test_the_cache_of_datasets_is_refused_with_a_file_that_can_be_read(tmp_path: Path, saved: Path) -> None:
    for part in ("data-00000-of-00001.arrow", "dataset_info.json"):
        shutil.copy(saved / "whole" / part, tmp_path)
    file = tmp_path / "data-00000-of-00001.arrow"
    with pytest.raises(DataError, match=f"a file of it can be read by itself, such as {file}$"):
        read(str(tmp_path))
    assert len(read(str(file))) == 3


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
