"""GGUF files: converted once, into a folder in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thinwire.model.errors import ModelError, first_line
from thinwire.model.files import check_shapes
from thinwire.model.folder import whole_folder
from thinwire.model.meta import hollow
from thinwire.model.metadata import FACTORS, OWN, check_tensors, complete
from thinwire.model.tokens_and_generation import quiet, settle_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STALE_SECONDS = 24 * 3600
MARK = ".fields"  # in a folder that was made with all that its file states; one without is made anew


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
    if (target / MARK).is_file():
        return target
    if target.parent.is_dir():
        # What a killed conversion left behind; one still at work is younger than this.
        for left in target.parent.glob(f".{gguf.stem}-*.tmp"):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    with quiet():
        model, tokenizer = read(gguf)
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
        with whole_folder(target, replace=target.is_dir()) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / MARK).write_text("")
    return target


def read(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The file's weights in floats, as a model, and its tokenizer; ModelError for a file that is none."""
    try:
        # Its progress bar obeys no setting of transformers. The file lies alone: what is beside it is not for it.
        with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as alone, quiet():
            (Path(alone) / gguf.name).symlink_to(gguf.resolve())
            return _read(Path(alone), gguf)
    except ModelError:
        raise
    except Exception as error:  # a broken file surfaces as anything from struct.error to a KeyError
        raise ModelError(f"cannot read the GGUF file {gguf}: {first_line(error)}") from error


def _read(folder: Path, gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of the GGUF file of that name in `folder`; `gguf` is named in errors."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = GGUFReader(folder / gguf.name)
    # the vocabulary is none of a model's fields, and long
    fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("tokenizer.")}
    factors = {
        FACTORS[tensor.name]: [float(value) for value in tensor.data.reshape(-1)]
        for tensor in reader.tensors
        if tensor.name in FACTORS
    }
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    config = AutoConfig.from_pretrained(folder, gguf_file=gguf.name)
    names = [tensor.name for tensor in reader.tensors]
    complete(config, fields, names, factors, gguf)
    kind = str(fields["general.architecture"])
    if kind not in OWN:
        empty = hollow(partial(AutoModelForCausalLM.from_config, dtype=torch.float32), config)
        how: Any = TENSOR_PROCESSORS.get(kind, TensorProcessor)
        processor = how(config=config.to_dict())
        check_tensors(names, get_gguf_hf_weights_map(empty, processor), gguf)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, info = loaded  # as output_loading_info has it
    check_shapes(info, f"the GGUF file {gguf}")
    if absent := sorted(info["missing_keys"]):
        raise ModelError(f"the GGUF file {gguf} lacks {len(absent)} tensors that the model needs, such as {absent[0]}")
    return model, tokenizer


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
