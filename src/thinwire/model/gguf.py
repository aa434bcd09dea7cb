"""GGUF files: converted once, into a folder in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import time
from pathlib import Path

import torch

from thinwire.model.errors import ModelError, first_line
from thinwire.model.folder import whole_folder
from thinwire.model.settle import quiet, settle_generation

STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """Where converted models are kept: THINWIRE_CACHE, else the user's cache folder."""
    ours = os.environ.get("THINWIRE_CACHE")
    if ours:
        return Path(ours).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "thinwire"


def converted(gguf: Path) -> Path:
    """The cached folder with the dequantised weights, config and tokenizer of a GGUF file."""
    target = cache_folder() / "models" / f"{gguf.stem}-{_sha256(gguf)[:12]}"
    if target.is_dir():
        return target
    if target.parent.is_dir():
        # What a killed conversion left behind; one still at work is younger than this.
        for left in target.parent.glob(f".{gguf.stem}-*.tmp"):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        try:
            # Its progress bar obeys no setting of transformers.
            with contextlib.redirect_stderr(io.StringIO()):
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
                model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        except Exception as error:  # a broken file surfaces as anything from struct.error to a KeyError
            raise ModelError(f"cannot read the GGUF file {gguf}: {first_line(error)}") from error
        # The weights are dequantised by now, but transformers leaves its marks on the model and then refuses
        # to save it.
        for holder, mark in (
            (model, "hf_quantizer"),
            (model, "quantization_method"),
            (model, "is_quantized"),
            (model.config, "quantization_config"),
        ):
            if mark in vars(holder):
                delattr(holder, mark)
        settle_generation(model, tokenizer)
        with whole_folder(target) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return target


def _sha256(file: Path) -> str:
    """The file's SHA-256, remembered in the cache for as long as its path, size and modification time stay."""
    stat = file.stat()
    seen = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
    note = cache_folder() / "hashes" / hashlib.sha256(seen).hexdigest()[:32]
    if note.is_file():
        known = note.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", known):  # a note cut short by a crash does not count
            return known
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(digest)
    return digest
