"""A model's folder in the form of Hugging Face: what must be in it, and how one comes to be whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thinwire.model.errors import ModelError, first_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def check_folder(folder: Path) -> None:
    """ModelError names what a folder lacks: its config, safetensors weights, a tokenizer."""
    lacking = []
    if not (folder / "config.json").is_file():
        lacking.append("config.json")
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        lacking += [shard for shard in shards(folder) if not (folder / shard).is_file()]
    elif not (folder / WEIGHTS).is_file():
        lacking.append(f"weights ({WEIGHTS})")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        lacking.append("a tokenizer")
    if lacking:
        raise ModelError(f"the model folder {folder} lacks {', '.join(lacking)}")


def shards(folder: Path) -> list[str]:
    """The names of the folder's safetensors files. ModelError: the index of a sharded folder cannot be read."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    try:
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"cannot read {folder / INDEX}: {first_line(error)}") from error


@contextmanager
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name once the block has ended well, its files flushed.

    The target never exists in part. With `replace` it takes the place of an older folder; without, the older one stays
    (another process was faster) and ours is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = f".{target.name}.{uuid.uuid4().hex[:12]}"
    temporary, old = target.with_name(f"{unique}.tmp"), target.with_name(f"{unique}.old")
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # safetensors makes its files private, whatever the umask
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                _flush(file)
        _flush(temporary)
        if replace and target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
                raise
            if replace or not target.is_dir():
                raise
        _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
