"""A learnt codec as a file: safetensors, with the kind of codec and a fingerprint of what it was learnt for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from thinwire import files
from thinwire.compress.learned.lora_image import Image

FORM = "thinwire codec 1"


@dataclass(frozen=True)
class Artefact:
    """The kind (resnet or learned), the fingerprint, the tensors."""

    kind: str
    fingerprint: str
    tensors: Mapping[str, Tensor]


def fingerprint(model: nn.Module, image: Image) -> str:
    """The model, the rank of its factors and their layout, for people and to be compared.

    Two models of the same names and shapes have one fingerprint, also where their weights differ.
    """
    frozen = [(n, tuple(p.shape)) for n, p in model.named_parameters() if not p.requires_grad]
    ranks = sorted({min(shape) for shape in image.shapes.values()})
    kind = "paper" if image.upright else "packed"
    of = f"model {_short(frozen)}, rank {' and '.join(map(str, ranks))}, {kind} {image.height} x {image.width}"
    return f"{of} ({_short(list(image.shapes.items()))})"


def write(path: Path, artefact: Artefact) -> None:
    """The file, which is there whole or not at all."""
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in artefact.tensors.items()}
    with files.whole(path) as partial:
        save_file(tensors, partial, {"form": FORM, "kind": artefact.kind, "fingerprint": artefact.fingerprint})


def read(path: Path) -> Artefact:
    """The artefact in a file; ValueError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("form") != FORM:
                raise ValueError(f"{path} is no codec of thinwire fit-codec")
            return Artefact(about["kind"], about["fingerprint"], {n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def _short(of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:8]
