"""Rows from wherever they are: a file, a folder of files, a packaged set, a Hugging Face data set."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from thinwire.data import huggingface
from thinwire.data.bundled import PACKAGED
from thinwire.data.errors import DataError
from thinwire.data.rows import Row, read_jsonl
from thinwire.data.shown import printable
from thinwire.data.tabular import read_arrow, read_csv, read_parquet

READERS: dict[str, Callable[[str | Path], list[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
PACKED = (".gz", ".bz2", ".xz", ".zst")  # after the ending of a kind; every reader unpacks
KINDS = ".jsonl, .csv, .tsv or .parquet"  # what people mostly have
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
LISTED = 50  # entries of a folder that a line names
LOG = logging.getLogger("thinwire")


def read(source: str) -> list[Row]:
    """The rows of one source; DataError where it cannot be read or holds none.

    `source` is a packaged set, a file (by its ending; JSONL where the ending is another), a folder that datasets'
    save_to_disk wrote, or the name of a data set on the hub, as `thinwire.data.huggingface` describes it.
    """
    if source in PACKAGED:
        return PACKAGED[source]()
    if reader_of(Path(source)) is None and not Path(source).is_file() and huggingface.place_of(source) is not None:
        return huggingface.read_hub(source)
    return read_file(source)


def read_file(path: str | Path) -> list[Row]:
    """The rows of a file or of a saved data set on this machine; DataError where it cannot be read or holds none."""
    if _is_saved(Path(path)):
        return huggingface.read_hub(str(path))
    return (reader_of(Path(path)) or read_jsonl)(path)


def reader_of(path: Path) -> Callable[[str | Path], list[Row]] | None:
    """What reads a file of such a name, that of a compressed file among them; None where its ending is not known."""
    return READERS.get(Path(_unpacked(path.name)).suffix.lower())


def is_folder_of_files(source: str) -> bool:
    """Whether the source is a folder, and not one that holds a saved data set."""
    return source not in PACKAGED and Path(source).is_dir() and huggingface.place_of(source) is None


def read_clients(folder: str | Path) -> dict[str, list[Row]]:
    """The rows of every client: a file each, of any kind, or a saved data set; named without the ending; by name.

    What else the folder holds is left out, and named in a warning. DataError where the folder is missing or holds no
    client, where two entries would be one client, and for what the reader of a file refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder" if folder.exists() else f"{folder}: the folder does not exist")
    files: dict[str, Path] = {}
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if (why := _no_client(path)) is not None:
            left.append(f"{path.name} ({why})")
            continue
        name = path.name if path.is_dir() else Path(_unpacked(path.name)).stem
        if name in files:
            raise DataError(f"{folder}: {files[name].name} and {path.name} would be the same client")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{folder}: the name of {printable(name)} is not UTF-8, so it can name no client") from None
        files[name] = path
    others = ", ".join(left[:LISTED]) + (f" and {len(left) - LISTED:,} more" if len(left) > LISTED else "")
    if not files:
        held = f"; it holds {others}" if left else ""
        raise DataError(f"{folder}: the folder holds no {KINDS} file (one is expected for each client){held}")
    if left:
        LOG.warning("%s: no clients, left out: %s", folder, others)
    shards = [name for name in files if SHARD.fullmatch(name)]
    if shards:
        LOG.warning("%s: %s is a part of a data set by its name; each part is a client here", folder, shards[0])
    return {name: read_file(files[name]) for name in sorted(files)}


def _no_client(path: Path) -> str | None:
    """Why an entry of a folder is no client's; None where it is one's."""
    # Some systems put "._name.jsonl" beside every file that they copy.
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return None if _is_saved(path) else "a folder"
    if reader_of(path) is None:
        return "no kind of file that is read"
    # A link that leads nowhere is a client whose rows are gone: its reader refuses it.
    return "no file" if path.exists() and not path.is_file() else None


def _is_saved(path: Path) -> bool:
    place = huggingface.place_of(str(path))
    return place is not None and place.saved


def _unpacked(name: str) -> str:
    """The name without the ending of a compressed file."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in PACKED else name
