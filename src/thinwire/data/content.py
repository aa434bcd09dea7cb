"""What a file is by its bytes, whatever its name is; its bytes unpacked where it is compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from thinwire.data.errors import DataError

BOM = b"\xef\xbb\xbf"
PARQUET, ARROW = "a Parquet file", "an Arrow file"
UTF = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
MARKS = {
    b"PK\x03\x04": "a zip archive, as Excel's .xlsx files are",
    b"PK\x05\x06": "a zip archive",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a file of an old Office, such as Excel's .xls",
    b"PAR1\x15": PARQUET,  # with what follows always: a table may have a column PAR1
    b"ARROW1\x00": ARROW,
    b"\xff\xff\xff\xff": ARROW,  # a stream, as datasets writes
    b"SQLite format 3\x00": "a SQLite database",
    b"%PDF-": "a PDF file",
    b"{\\rtf": "a rich text file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a": "a RAR archive",
    b"Obj\x01": "an Avro file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"\x80\x04": "a pickle, which is never loaded",
    b"\x80\x05": "a pickle, which is never loaded",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file itself)",
}
PAGES = {b"<!doctype html": "a web page (HTML)", b"<html": "a web page (HTML)", b"<?xml": "an XML file"}


def form_of(head: bytes) -> str | None:
    """What a file that begins so is, with its article; None for text, and for what is not known."""
    for mark, name in UTF.items():
        if head.startswith(mark):
            return f"{name} text (save it as UTF-8)"
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    zeros = tuple(byte == 0 for byte in head[:4])  # a text without a mark begins with ASCII, as JSON and tables do
    if zeros in ((False, True, False, True), (True, False, True, False)):
        return "UTF-16 text (save it as UTF-8)"
    if zeros in ((False, True, True, True), (True, True, True, False)):
        return "UTF-32 text (save it as UTF-8)"
    start = head.removeprefix(BOM).lstrip()[:16].lower()
    return next((name for mark, name in PAGES.items() if start.startswith(mark)), None)


@contextmanager
def opened(path: str | Path, wanted: str) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where it is compressed with gzip, bzip2, xz or zstandard.

    DataError where it cannot be read, and where its bytes show that it is something else than `wanted`, which is
    PARQUET, ARROW, or what to call a text.
    """
    try:
        with open(path, "rb") as raw:
            file = _unpacked(raw)
            form = form_of(file.peek(512))
            if form is not None and form != wanted:
                raise DataError(f"{path}: is {form}, not {wanted}")
            yield file
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: cannot be read (compressed, and damaged: {error})") from None
    except OSError as error:  # of the system, or of pyarrow for what is damaged
        raise DataError(f"{path}: cannot be read ({error.strerror or str(error).splitlines()[0]})") from None


def lines(path: str | Path, wanted: str) -> Iterator[bytes]:
    """The lines of a text without its byte order mark, each with its end; CR alone ends them where no LF stands."""
    with opened(path, wanted) as file:
        found: BinaryIO = file
        head = file.peek(512)
        if b"\r" in head and b"\n" not in head:
            whole = file.read()
            found = io.BytesIO(whole if b"\n" in whole else whole.replace(b"\r", b"\n"))
        for number, raw in enumerate(found):
            yield raw if number else raw.removeprefix(BOM)


def _unpacked(raw: io.BufferedReader) -> io.BufferedReader:
    head = raw.peek(16)
    packed: IO[bytes]
    if head.startswith(b"\x1f\x8b"):
        packed = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    elif head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        packed = bz2.BZ2File(raw)
    elif head.startswith(b"\xfd7zXZ\x00"):
        packed = lzma.LZMAFile(raw)  # noqa: SIM115 - closed with `raw`
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        packed = pyarrow.CompressedInputStream(raw, "zstd")  # zstandard's own reader takes a cut file for a whole one
    else:
        return raw
    return io.BufferedReader(cast(io.RawIOBase, packed))
