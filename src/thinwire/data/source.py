"""Rows from wherever they are: a file, a folder of files, a packaged set, a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thinwire.data import hub
from thinwire.data.errors import DataError
from thinwire.data.load import Row, read_jsonl
from thinwire.data.packaged import PACKAGED
from thinwire.data.table import read_csv, read_parquet

READERS: dict[str, Callable[[str | Path], list[Row]]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
KINDS = "{}, {} or {}".format(", ".join([*READERS][:-2]), *[*READERS][-2:])


def read(source: str) -> list[Row]:
    """The rows of one source; DataError where it cannot be read or holds none.

    `source` is a packaged set, a file (by its ending; JSONL where the ending says nothing), a folder that datasets'
    save_to_disk wrote, or the name of a data set on the hub, as `thinwire.data.hub` says.
    """
    if source in PACKAGED:
        return PACKAGED[source]()
    reader = READERS.get(Path(source).suffix.lower())
    if reader is None and not Path(source).is_file() and hub.place_of(source) is not None:
        return hub.read_hub(source)
    return (reader or read_jsonl)(source)


def is_folder_of_files(source: str) -> bool:
    """Whether the source is a folder, and not one that holds a saved data set."""
    return source not in PACKAGED and Path(source).is_dir() and hub.place_of(source) is None


def read_clients(folder: str | Path) -> dict[str, list[Row]]:
    """The rows of every client: a file each, of any kind, the client named as its file without the ending; by name.

    DataError where the folder is missing or holds no such file, where two files would be one client, and for what the
    reader of a file refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder" if folder.exists() else f"{folder}: the folder does not exist")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # Hidden files are left out: some systems put "._name.jsonl" beside every file that they copy.
        if path.suffix.lower() not in READERS or path.name.startswith("."):
            continue
        if path.stem in files:
            raise DataError(f"{folder}: {files[path.stem].name} and {path.name} would be the same client")
        files[path.stem] = path
    if not files:
        raise DataError(f"{folder}: the folder holds no {KINDS} file (one is expected for each client)")
    return {name: READERS[files[name].suffix.lower()](files[name]) for name in sorted(files)}
