"""Files that are not what their names promise: unpacked where they are compressed, else refused as what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import feather, parquet

from thinwire.data.errors import DataError
from thinwire.data.rows import read_jsonl
from thinwire.data.tabular import read_arrow, read_csv, read_parquet

JSON = '{"a": "x", "b": "é"}\n{"a": "y", "b": "z"}\n'
CSV = "a,b\nx,é\ny,z\n"
ROWS = [{"a": "x", "b": "é"}, {"a": "y", "b": "z"}]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstandard": zstandard.compress,
}


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as zip:
            zip.writestr("rows.jsonl", JSON)
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("rows.jsonl"))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
    else:
        feather.write_feather(pyarrow.Table.from_pylist(ROWS), out)
    return out.getvalue()


def database(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "db")
    connection.execute("create table rows(a)")
    connection.close()
    return (folder / "db").read_bytes()


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(("read", "text"), [(read_jsonl, JSON), (read_csv, CSV)])
def test_what_is_compressed_is_unpacked_whatever_its_name(
    tmp_path: Path, pack: str, read: Callable[[Path], list], text: str
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(PACK[pack](text.encode()))
    assert [row.fields for row in read(path)] == ROWS
    whole = PACK[pack](text.encode() * 400)
    for cut in (len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"rows: cannot be read \(.*\)$"):
            read(path)


def test_what_is_compressed_and_columnar(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for kind, read in (("parquet", read_parquet), ("arrow", read_arrow)):
        for pack in (bytes, *PACK.values()):
            path.write_bytes(pack(archive(kind)))
            assert [row.fields for row in read(path)] == ROWS


@pytest.mark.parametrize("read", [read_jsonl, read_csv, read_parquet])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        *((JSON.encode(code), f"is UTF-{code[4:6]} text") for code in ("utf-16", "utf-16-be", "utf-32", "utf-32-le")),
        (archive("zip"), "is a zip archive, as Excel's .xlsx files are"),
        (archive("tar"), "is a tar archive"),
        (archive("arrow"), "is an Arrow file"),
        (b"\n<!DOCTYPE html>\n<html>Log in</html>", "is a web page (HTML)"),
        (b"<?xml version='1.0'?><rows/>", "is an XML file"),
        (b"%PDF-1.4\n%\xe2\xe3", "is a PDF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS"),
        (pickle.dumps(ROWS), "is a pickle, which is never loaded"),
    ],
)
def test_what_is_something_else_is_refused_as_that(
    tmp_path: Path, read: Callable[[Path], list], content: bytes, what: str
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {what}")
    assert "\n" not in str(caught.value)


def test_a_database_and_a_parquet_file_are_no_text(tmp_path: Path) -> None:
    for content, what in ((database(tmp_path), "a SQLite database"), (archive("parquet"), "a Parquet file")):
        (tmp_path / "rows").write_bytes(content)
        for read in (read_jsonl, read_csv):
            with pytest.raises(DataError, match=f"rows: is {what}, not "):
                read(tmp_path / "rows")


def test_a_table_under_the_name_of_json_and_the_other_way(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("instruction,output\nx,y\n")
    with pytest.raises(DataError, match=r"rows: begins as a table or plain text does \('instruction,output'\)"):
        read_jsonl(path)
    for text in (JSON, "[\n" + JSON, "{\n", '[{"a": 1}]'):
        path.write_text(text)
        with pytest.raises(DataError, match="rows: is JSON, one object a line, or one array of them, not a CSV file"):
            read_csv(path)


def test_lines_that_end_in_cr_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for read, text in ((read_jsonl, JSON), (read_csv, CSV)):
        path.write_bytes(text.replace("\n", "\r").encode())
        rows = read(path)
        assert [row.fields for row in rows] == ROWS
        assert rows[1].line - rows[0].line == 1
