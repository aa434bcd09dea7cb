"""A thin file: what was trained on a view of few numbers, in some ten kilobytes, for whoever has the base model.

It is a frame as it travels (wire/frame.py), and is read as warily. Numbers that lie on 8 bits' levels, as `onebit`
leaves them, take a byte each; others are there as they are, or in fewer bits at a loss that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from thinwire import files, wire
from thinwire.assemble.model import classes_of
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.config import Data, Run
from thinwire.keys import Key
from thinwire.model import numbers
from thinwire.model.errors import ModelError, first_line
from thinwire.model.net import Net
from thinwire.model.numbers import digest
from thinwire.model.resolve import resolve
from thinwire.model.views import AnyView, View

BLOCKS = (1024, 128, 512, 2048, 4096, 256, 64)  # that share a scale, in methods' settings: tried in turn
LARGEST = 1 << 32  # bytes of a file
SHOWN = {"template", "prompt", "answer", "choices", "words", "max_length", "loss"}  # fields of [data] about prompts


@dataclass(frozen=True)
class Thin:
    """The numbers, and what they are numbers of.

    `model`: what the run file called the start model; `base`: the hash of it as the view finds it. `view`: its settings
    as JSON, drawn from `seed`. `shown`: the settings of prompts, as JSON. `levels`: of Blocks(bits, block), uint8; or
    `numbers`, float32.
    """

    model: str
    base: str
    dtype: str
    view: str
    seed: int
    shown: str
    classes: list[str] | None
    bits: int
    block: int
    levels: Tensor | None
    numbers: Tensor | None


def of(net: Net, change: Tensor, run: Run, classes: Sequence[str] | None, bits: int | None = None) -> Thin:
    """What is to be kept of a run's net that has `change` as its numbers, whatever it loses in so many `bits`."""
    numbers.fill(net, torch.zeros(net.size))
    model, dtype, seed, shown = run.model.path, run.model.dtype, run.seed, run.data.model_dump_json(include=SHOWN)
    view = net.view.model_dump_json()
    settings = (model, digest(net), dtype, view, seed, shown, None if classes is None else list(classes))
    for block in BLOCKS:
        code = Blocks(bits or 8, block)
        levels = code.encode(change, 0)
        if bits is not None or torch.equal(code.decode(levels, change.shape, 0), change):
            return Thin(*settings, code.bits, block, to_tensor(levels), None)
    return Thin(*settings, 0, 0, None, change)


def write(path: Path, thin: Thin) -> int:
    """Write the file, whole or not at all; its bytes."""
    frame = bytes(wire.encode(thin))
    files.write(path, frame)
    return len(frame)


def carry(run: Run, net: Net, state: Any, folder: Path) -> None:
    """What a state of few numbers is worth, as model.thin in the folder; the net may be hollow."""
    write(folder / "model.thin", of(net, state.numbers, run, classes_of(run, net.folder)))


def read(path: Path) -> Thin:
    """What is in the file; ModelError for one that is none."""
    try:
        if path.stat().st_size > LARGEST:
            raise ModelError(f"{path}: longer than any thin file")
        return wire.decode(Thin, wire.Frame(path.read_bytes()), LARGEST)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except wire.WireError as error:
        raise ModelError(f"{path}: no thin file ({error})") from None


def opened(path: Path, base: str | None = None, device: str = "cpu") -> tuple[Net, Thin]:
    """The base model with the file's numbers in it; `base`: where the model is, None: where the file has it from.

    ModelError: no such file or model, or the numbers are of another one.
    """
    thin = read(path)
    try:
        view: View = TypeAdapter(AnyView).validate_json(thin.view)
    except ValidationError:
        raise ModelError(f"{path}: its view is none of this version's") from None
    key = Key.root(thin.seed)
    net = Net.open(
        resolve(base or thin.model).as_posix(),
        thin.dtype,
        device=device,
        view=view,
        view_key=key.fold(view.kind),
        classes=thin.classes,
        head_key=key.fold("head"),
    )
    if (mine := digest(net)) != thin.base:
        raise ModelError(
            f"{path}: it is of another base model: {thin.base} ({thin.model}), and {base or thin.model} is {mine}"
        )
    numbers.fill(net, _numbers(path, thin, net.size))
    return net, thin


def data_of(path: Path, thin: Thin) -> Data:
    """The settings of prompts, as [data] of a run file that names no rows; ModelError where they are none."""
    try:
        fields = json.loads(thin.shown)
        if not isinstance(fields, dict) or not set(fields) <= SHOWN:
            raise ValueError("other fields")
        return Data.model_validate({**fields, "path": "none"})
    except ValueError as error:
        raise ModelError(f"{path}: its settings of prompts are none of this version's ({first_line(error)})") from None


def _numbers(path: Path, thin: Thin, count: int) -> Tensor:
    try:
        if thin.levels is not None:
            return Blocks(thin.bits, thin.block).decode(to_bytes(thin.levels), (count,), 0)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    found = thin.numbers
    if found is None or found.dtype != torch.float32 or found.shape != (count,) or not torch.isfinite(found).all():
        raise ModelError(f"{path}: it does not have the {count:,} numbers of its view")
    return found
