"""A thin file: what was trained on a view of few numbers, in some ten kilobytes, for whoever has the base model.

It is a frame as it travels (wire/frame.py), and is read as warily. Numbers that lie on 8 bits' levels, as `onebit`
leaves them, take a byte each; others are there as they are, or in fewer bits at a loss that is asked for.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from thinwire import files, wire
from thinwire.assemble.model import classes_of
from thinwire.assemble.rows import template_of
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.config import Data, Run
from thinwire.errors import UserError
from thinwire.keys import Key
from thinwire.model.errors import ModelError, first_line
from thinwire.model.load import load
from thinwire.model.net import Net
from thinwire.model.numbers import digest
from thinwire.model.resolve import resolve
from thinwire.model.views import AnyView, View
from thinwire.model.views.keep import kept
from thinwire.model.views.virtual import of as prompt_of
from thinwire.train.stages import Stages, arrive, check_merges, check_stages
from thinwire.wire.legal import LARGEST
from thinwire.wire.payload import LATE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCKS = (1024, 128, 512, 2048, 4096, 256, 64)  # that share a scale, in methods' settings: tried in turn
MOST = 1 << 32  # bytes of a file
TEXT = 1 << 18  # characters of its settings
CLASSES = 1 << 14
BASE = "base"  # in place of a file's name
# fields of [data] about prompts
SHOWN = {"template", "prompt", "answer", "choices", "words", "max_length", "loss", "rejected", "beta", "scale"}


@dataclass(frozen=True)
class Thin:
    """The numbers, and what they are numbers of.

    `model`: what the run file called the start model; `base`: the hash of it as the view finds it. `view`: its settings
    as JSON, drawn from `seed`. `shown`: the settings of prompts, as JSON. `levels`: of Blocks(bits, block), uint8; or
    `numbers`, float32. `stages`: those before these numbers, see train.stages.
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
    stages: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)


def of(
    net: Net, change: Tensor, run: Run, classes: Sequence[str] | None, bits: int | None, stages: Stages | None
) -> Thin:
    """What is to be kept of a run's net that has `change` as its numbers, whatever it loses in so many `bits`."""
    arrive(net, {}, torch.zeros(net.size))
    model, dtype, seed, shown = run.model.path, run.model.dtype, run.seed, run.data.model_dump_json(include=SHOWN)
    view = net.view.model_dump_json()
    settings = (model, digest(net), dtype, view, seed, shown, None if classes is None else list(classes))
    for block in BLOCKS:
        code = Blocks(bits or 8, block)
        levels = code.encode(change, 0)
        if bits is not None or torch.equal(code.decode(levels, change.shape, 0), change):
            return Thin(*settings, code.bits, block, to_tensor(levels), None, stages)
    return Thin(*settings, 0, 0, None, change, stages)


def write(path: Path, thin: Thin) -> int:
    """Write the file, whole or not at all; its bytes."""
    frame = bytes(wire.encode(thin))
    files.write(path, frame)
    return len(frame)


def carry(run: Run, net: Net, state: Any, folder: Path) -> None:
    """What a state of few numbers is worth, as model.thin in the folder; the net may be hollow."""
    classes, over = classes_of(run, net.folder), getattr(state, "stages", None)
    write(folder / "model.thin", of(net, state.numbers, run, classes, None, over))


def read(path: Path) -> Thin:
    """What is in the file; ModelError for one that is none, or whose parts contradict each other.

    Nothing of the size that a header claims is allocated before the file is seen to have so much.
    """
    try:
        size = path.stat().st_size
        if size > MOST:
            raise ModelError(f"{path}: longer than any thin file")
        thin = wire.decode(Thin, wire.Frame.load(path), MOST)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except wire.WireError as error:
        raise ModelError(f"{path}: no thin file ({error})") from None
    classes = thin.classes
    wrong = {
        "it has levels and numbers, or neither": (thin.levels is None) == (thin.numbers is None),
        "its seed is negative": thin.seed < 0,
        "its settings are longer than any run's": max(map(len, (thin.view, thin.shown, thin.model))) > TEXT,
        f"its classes are not 2 to {CLASSES:,} different ones": classes is not None
        and not 2 <= len(set(classes)) == len(classes) <= CLASSES,
    }
    for why in (why for why, found in wrong.items() if found):
        raise ModelError(f"{path}: {why}")
    return thin


def opened(path: Path, base: str | None = None, device: str = "cpu") -> tuple[Net, Thin]:
    """The base model with the file's numbers in it; `base`: where the model is, None: where the file has it from.

    ModelError: no such file or model, or the numbers are of another one.
    """
    shelf = Shelf([path], base, device)
    return shelf.use(shelf.names[0])


@dataclass(frozen=True)
class _Kept:
    path: Path
    thin: Thin
    data: Data
    net: Net


class Shelf:
    """Thin files over one base model, which is in memory once, with the numbers of one file or of none in it.

    `names`: of the files, in their order: their stems, and a number after those that are there before. Files of one
    view share a net; each other view has modules of its own over the same weights.
    """

    def __init__(self, paths: Sequence[Path], base: str | None = None, device: str = "cpu") -> None:
        """ModelError: a file is none or is there twice, or is of another base, dtype or set of classes."""
        for i, path in enumerate(paths):
            if any(path.resolve() == other.resolve() for other in paths[:i]):
                raise ModelError(f"{path}: the file is there twice")
        found = [(path, read(path)) for path in paths]
        files = [(path, thin, _view(path, thin), data_of(path, thin)) for path, thin in found]
        first = files[0][1]
        embeds = files[0][3].loss == "contrastive"
        for path, thin, _, data in files:
            same = {"dtype": thin.dtype == first.dtype, "classes": thin.classes == first.classes}
            for what, fits in (same | {"task": (data.loss == "contrastive") == embeds}).items():
                if not fits:
                    raise ModelError(f"{path}: another {what} than {paths[0]}, and one base is loaded for all of them")
        where, head = base or first.model, Key.root(first.seed).fold("head") if first.classes is not None else None
        try:
            place = resolve(where)
        except OSError as error:  # a name that no file may have
            raise ModelError(f"{paths[0]}: {where:.200}: {error.strerror}") from None
        model, tokenizer, folder = load(place.as_posix(), first.dtype, False, first.classes, head, device, None, embeds)
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        views = list(dict.fromkeys((thin.view, thin.seed) for _, thin, *_ in files))
        nets: dict[tuple[str, int], tuple[Net, str]] = {}
        self._files: dict[str, _Kept] = {}
        for path, thin, view, data in files:
            which, key = (thin.view, thin.seed), Key.root(thin.seed)
            if which not in nets:
                for parameter, was in trained:
                    parameter.requires_grad_(was)
                last = len(nets) == len(views) - 1
                own = model if last else _beside(model)
                try:
                    _check_size(path, thin, _count(view, own))
                    to = None if device == "auto" else device
                    net = Net.over(own, tokenizer, folder, place.as_posix(), view, key.fold(view.kind), to, head)
                except ModelError as error:
                    why = str(error).removeprefix(f"{path}: ")
                    raise ModelError(f"{path}: {why:.300}") from None
                nets[which] = net, digest(net)
            net, mine = nets[which]
            if mine != thin.base:
                its = f"{thin.base:.16} ({thin.model:.200})"
                raise ModelError(f"{path}: it is of another base model: {its}, and {where:.200} is {mine}")
            _check_size(path, thin, net.size)
            _numbers(path, thin, net.size)  # refused now, and not in the middle of a talk
            if thin.stages:
                check_merges(net, str(path))
            self._files[_unused(path.stem, [BASE, *self._files])] = _Kept(path, thin, data, net)
        self.names = list(self._files)
        self._last = self.names[0]

    @property
    def paths(self) -> dict[str, Path]:
        """Of the files, by name."""
        return {name: file.path for name, file in self._files.items()}

    @property
    def data(self) -> Data:
        """How rows are shown, as the last file that was used has it."""
        return self._files[self._last].data

    def use(self, name: str) -> tuple[Net, Thin]:
        """Put a file's numbers in place, or for BASE none: the base's weights are then what they were, to the bit.

        The other settings stay those of the last file where it is BASE. KeyError: no such name.
        """
        before, file = self._files[self._last].net, self._files[self._last if name == BASE else name]
        if name == BASE or file.net is not before:  # whose weights another view reads too
            before.reset()
            before.view.refresh(before.model)
        if name != BASE:
            arrive(file.net, file.thin.stages or {}, _numbers(file.path, file.thin, file.net.size))
            self._last = name
        if (prompt := prompt_of(file.net.model)) is not None:
            prompt.present = name != BASE
        return file.net, file.thin


def data_of(path: Path, thin: Thin) -> Data:
    """The settings of prompts, as [data] of a run file that names no rows; ModelError where they are none."""
    try:
        fields = json.loads(thin.shown)
        if not isinstance(fields, dict) or not set(fields) <= SHOWN:
            raise ValueError("other fields")
        data = Data.model_validate({**fields, "path": "none"})
        template_of(data, thin.classes is not None)  # refuses what is none
        return data
    except (ValueError, RecursionError, UserError) as error:
        why = first_line(error)[:200]
        raise ModelError(f"{path}: its settings of prompts are none of this version's ({why})") from None


def _view(path: Path, thin: Thin) -> View:
    try:
        view: View = TypeAdapter(AnyView).validate_json(thin.view)
    except ValidationError:
        raise ModelError(f"{path}: its view is none of this version's") from None
    return view


def _beside(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in modules of its own, over the same weights."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _unused(stem: str, taken: Sequence[str]) -> str:
    names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _count(view: View, model: PreTrainedModel) -> int:
    """How many numbers the view would make of a model, without making them."""
    shapes = view.trained(model)
    stays = kept(shapes, view.keep)
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in stays)


def _check_size(path: Path, thin: Thin, count: int) -> None:
    """ModelError unless the file has so many numbers."""
    try:
        if thin.levels is not None:
            fits = Blocks(thin.bits, thin.block).size(count) == thin.levels.numel()
        else:
            fits = thin.numbers is not None and thin.numbers.shape == (count,)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    if not fits:
        raise ModelError(f"{path}: it does not have the {count:,} numbers of its view")


def _numbers(path: Path, thin: Thin, count: int) -> Tensor:
    try:
        check_stages(thin.stages or {}, count)
        if thin.levels is not None:
            found = Blocks(thin.bits, thin.block).decode(to_bytes(thin.levels), (count,), 0)
        else:
            assert thin.numbers is not None
            found = thin.numbers
    except (ValueError, wire.WireError) as error:
        raise ModelError(f"{path}: {error}") from None
    if found.dtype != torch.float32 or not bool((found.abs() <= LARGEST).all()):
        raise ModelError(f"{path}: a number of it is beyond {LARGEST:g} or not finite")
    return found
