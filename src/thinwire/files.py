"""Files that are there whole or not at all: written beside their place, flushed to the disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its name once the block has ended well; until then the old one is there."""
    partial = path.with_name(path.name + ".part")
    yield partial
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Write a file that is whole, old or new, whenever it is looked at."""
    with whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
