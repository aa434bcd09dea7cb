"""The start model beside a net, on disk: its tensors, each read when it is asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from thinwire.model.errors import ModelError, first_line
from thinwire.model.folder import shards
from thinwire.model.gguf import cache_folder
from thinwire.wire.frame import raw

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Base(Mapping[str, Tensor]):
    """The start model's trainable tensors, each read from its safetensors file when asked for; read-only.

    A tensor comes with the shape, dtype and device of the net's parameter of that name. It may be a private
    view of the file: an edit never reaches the file. A frozen one is to be had by its name too, if not in the list.
    ModelError: a tensor is absent from the files or has another shape.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        model: PreTrainedModel,
        draw: Callable[[list[str]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """A tensor is that of the first of the `folders` that has it; `draw` makes the trainable ones that none has."""
        from safetensors import SafetensorError, safe_open

        names = tied(model)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        aliases = {name: _spellings(model, names[name]) for name in names}
        self._drawn: Mapping[str, Tensor] = {}
        self._begun: Mapping[str, Tensor] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in (folder / shard for folder in folders for shard in shards(folder)):
            try:
                with safe_open(path, framework="pt") as file:
                    held = set(file.keys())
                    for name, parameter in model.named_parameters():
                        key = next((alias for alias in aliases[name] if alias in held), None)
                        if key is None or name in self._places:
                            continue
                        shape = tuple(file.get_slice(key).get_shape())
                        if shape == tuple(parameter.shape):
                            self._places[name] = (path, key)
                        elif name in self._parameters:
                            raise ModelError(f"{key} in {path} has the shape {shape}, not {tuple(parameter.shape)}")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot read {path}: {first_line(error)}") from error
        absent = [name for name in self._parameters if name not in self._places]
        if absent and draw is not None:
            self._drawn = draw(absent)
        elif absent:
            folder = folders[0]
            raise ModelError(f"the weights in {folder} lack {len(absent)} tensors of the model, such as {absent[0]}")

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        parameter = self._parameters.get(name)
        if parameter is None:
            parameter = self._frozen[name]
            if name not in self._places or not parameter.is_floating_point():
                raise ModelError(f"{name} is not in the model's files as the model has it")
        drawn = self._begun.get(name, self._drawn.get(name))
        if drawn is not None:
            return drawn.to("cpu" if parameter.is_meta else parameter.device, parameter.dtype, copy=True)
        file, key = self._places[name]
        # Opened anew each time: the pages of one map would stay resident, all of the model's in the end.
        with safe_open(file, framework="pt") as opened:
            held: Tensor = opened.get_tensor(key)
            return held.to("cpu" if parameter.is_meta else parameter.device, parameter.dtype)

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """From now on the start of these is not what the files have; {}: all are the files' again."""
        self._begun = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def starts_like(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether each tensor on disk has the first row of the parameter, bit for bit; reads only those rows."""
        from safetensors import safe_open

        for name, parameter in parameters.items():
            if name in self._drawn:
                if not torch.equal(self[name], parameter):
                    return False
                continue
            file, key = self._places[name]
            with safe_open(file, framework="pt") as opened:
                row = opened.get_slice(key)[:1] if parameter.ndim else opened.get_tensor(key)
            mine = parameter.detach()[:1] if parameter.ndim else parameter.detach()
            if raw(row.to(parameter.dtype)) != raw(mine):
                return False
        return True


def tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter, under its first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def _spellings(model: PreTrainedModel, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, and each with and without the prefix of the headless model, as some files are written.

    A layer that a view has put factors beside is in the files under its own name.
    """
    prefix = f"{model.base_model_prefix}."
    names = tuple(name.replace(".base_layer.", ".") for name in names)
    return (
        *names,
        *(name.removeprefix(prefix) if name.startswith(prefix) else prefix + name for name in names),
    )


def spool(model: PreTrainedModel) -> Path:
    """A fresh folder with the trainable tensors of the model as they are, under the model's own names."""
    from safetensors.torch import save_file

    cache_folder().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="base-", dir=cache_folder()))
    try:
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad},
            folder / "model.safetensors",
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
