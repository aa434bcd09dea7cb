"""A model's folder in the form of Hugging Face: what must be in it, and how one comes to be whole or not at all."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thinwire.files import flush
from thinwire.model.errors import ModelError, first_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def check_folder(folder: Path) -> None:
    """ModelError names what a folder lacks: its config, safetensors weights, a tokenizer; or that it holds a PEFT
    adapter, alone or beside a model."""
    check_adapter(folder)
    lacking = []
    if not (folder / "config.json").is_file():
        lacking.append("config.json")
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        lacking += [shard for shard in shards(folder) if not (folder / shard).is_file()]
    elif not (folder / WEIGHTS).is_file():
        lacking.append(f"weights ({WEIGHTS})")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        lacking.append("a tokenizer")
    if not lacking:
        return
    pickled = next((name for name in PICKLED if (folder / name).is_file()), None)
    if f"weights ({WEIGHTS})" in lacking and pickled is not None:
        hint = (
            f"; {pickled} could run code as it is read, so only safetensors are: where you trust it, convert it once "
            "with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) of transformers"
        )
    else:
        hint = ""
    raise ModelError(f"the model folder {folder} lacks {', '.join(lacking)}{hint}")


def check_adapter(folder: Path) -> None:
    """ModelError: the folder holds a PEFT adapter. transformers would load its base, or put it over the model there."""
    file = folder / ADAPTER
    if not file.is_file():
        return
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise ModelError(
            f"the model folder {folder} also holds an adapter ({ADAPTER}): move the adapter out of it where its "
            "weights are merged into the model, or else merge them first"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    except (OSError, ValueError):
        base = None
    model = f"its base model {base}" if base else "the base model that it was trained on"
    raise ModelError(
        f"{folder} holds an adapter ({ADAPTER}) and no whole model: merge it into {model} "
        "(merge_and_unload of PEFT) and name the folder of the result, or train that model with [model.lora]"
    )


def shards(folder: Path) -> list[str]:
    """The names of the folder's safetensors files. ModelError: the index of a sharded folder cannot be read."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    try:
        found = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if not found or any(Path(name).name != name for name in found):
            raise ValueError("its weight_map names no files of the folder")
        return found
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"cannot read {folder / INDEX}: {first_line(error)}") from error


def check_replaceable(target: Path) -> None:
    """ModelError: there is something, and it is no model's folder."""
    if (target / "config.json").is_file() or not target.exists():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ModelError(f"will not replace {target}: it is not a model folder")


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
                flush(file)
        flush(temporary)
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
        flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
