"""A model as a flat, named list of trainable tensors, and the start model beside it on disk."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from thinwire.model import head
from thinwire.model.errors import ModelError, first_line
from thinwire.model.folder import shards, whole_folder
from thinwire.model.gguf import cache_folder
from thinwire.model.load import load
from thinwire.model.tokens_and_generation import quiet
from thinwire.model.trial import check_causal, positions
from thinwire.model.views import lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from thinwire.keys import Key

# Integer views of the same width, to reach the raw bytes of types that numpy does not know.
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Base(Mapping[str, Tensor]):
    """The start model's trainable tensors, each read from its safetensors file when asked for; read-only.

    A tensor comes with the shape, dtype and device of the net's parameter of that name. It may be a private
    view of the file: an edit never reaches the file. ModelError: a tensor is absent from the files or has
    another shape.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        aliases: Mapping[str, tuple[str, ...]],
        draw: Callable[[list[str]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """`aliases` lists, for each name, the names under which a file may hold it; `draw` makes those in no file."""
        from safetensors import SafetensorError, safe_open

        self._parameters = dict(parameters)
        self._drawn: Mapping[str, Tensor] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for shard in shards(folder):
            try:
                with safe_open(folder / shard, framework="pt") as file:
                    held = set(file.keys())
                    for name, parameter in parameters.items():
                        key = next((alias for alias in aliases[name] if alias in held), None)
                        if key is None or name in self._places:
                            continue
                        shape = tuple(file.get_slice(key).get_shape())
                        if shape != tuple(parameter.shape):
                            raise ModelError(
                                f"{key} in {folder / shard} has the shape {shape}, not {tuple(parameter.shape)}"
                            )
                        self._places[name] = (folder / shard, key)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot read {folder / shard}: {first_line(error)}") from error
        absent = [name for name in parameters if name not in self._places]
        if absent and draw is not None:
            self._drawn = draw(absent)
        elif absent:
            raise ModelError(f"the weights in {folder} lack {len(absent)} tensors of the model, such as {absent[0]}")

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        parameter = self._parameters[name]
        if name in self._drawn:
            return self._drawn[name].to("cpu" if parameter.is_meta else parameter.device, parameter.dtype, copy=True)
        file, key = self._places[name]
        # Opened anew each time: the pages of one map would stay resident, all of the model's in the end.
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key).to("cpu" if parameter.is_meta else parameter.device, parameter.dtype)

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
            if _bytes(row.to(parameter.dtype)) != _bytes(mine):
                return False
        return True


class Net:
    """A borrowed workspace: one resident model and the read-only start model beside it on disk.

    Its contents are undefined when borrowed. Every write is in place, and reaches the trainable parameters
    only: frozen ones and buffers stay as they were loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path | str,
        trainable: Callable[[str], bool] | None = None,
        remember: bool = False,
        head_key: Key | None = None,
    ) -> None:
        """Wrap `model`, whose start weights lie in `folder`.

        `trainable` says by name which parameters are trained (None: all); the others are frozen, as are those
        that do not require a gradient already. A tied parameter is one, under its first name, and trained if
        any of its names is chosen. `remember` lets `rebuild` keep a copy of one set of weights. What a classifier's
        files lack of its head is drawn from `head_key`. ModelError: nothing is trainable, or see Base.
        """
        self._model, self.tokenizer, self.folder = model, tokenizer, Path(folder)
        self.remember = remember
        self._resting = False
        self._kept: tuple[bytes, dict[str, Tensor]] | None = None
        tied = _tied(model)
        if trainable is not None:
            for name, parameter in model.named_parameters():
                if not any(trainable(alias) for alias in tied[name]):
                    parameter.requires_grad_(False)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ModelError(f"no parameter of the model in {folder} is trainable")
        self.names: tuple[str, ...] = tuple(self._parameters)
        spellings = {name: _spellings(model, tied[name]) for name in self.names}
        draw = None if head_key is None else lambda names: head.drawn(model, names, head_key)
        self.base = Base(self.folder, self._parameters, spellings, draw)
        self.size = sum(p.numel() for p in self._parameters.values())
        self.nbytes = sum(p.numel() * p.element_size() for p in self._parameters.values())

    @classmethod
    def open(
        cls,
        path: str,
        dtype: str = "float32",
        trainable: Callable[[str], bool] | None = None,
        remember: bool = False,
        device: str = "cpu",
        adapt: Callable[[PreTrainedModel], None] | None = None,
        hollow: bool = False,
        classes: Sequence[str] | None = None,
        head_key: Key | None = None,
        bits: int | None = None,
    ) -> Net:
        """Load the model at `path` (see load.resolve) onto `device` and wrap it. ModelError as there.

        Device auto: all GPUs of the machine, each with some layers. `bits`, 8 or 4: linear layers are quantised, for
        `adapt` to add what is trained.

        `adapt` may add parameters to the model and freeze others, as lora.add_lora does, before it is wrapped.
        A `hollow` net has names, shapes, config, tokenizer and base, and no weights in memory: for a client half that
        builds a smaller model of its own. With `classes` it is a classifier, see load.load.
        """
        head_key = (
            None if classes is None else head_key
        )  # a causal model's head is in its files, or it is no such model
        model, tokenizer, folder = load(path, dtype, hollow, classes, head_key, device, bits)
        if hollow:
            return cls(model, tokenizer, folder, head_key=head_key)
        if adapt is not None:
            adapt(model)
        try:
            if device != "auto" and bits is None:
                model.to(device)
        except (RuntimeError, AssertionError) as error:  # no such device, or a torch without it
            raise ModelError(f"model.device: {device}: {first_line(error)}") from None
        if classes is None:
            check_causal(model, path)
        try:
            net = cls(model, tokenizer, folder, trainable, remember, head_key)
            if net.base.starts_like(dict(net.parameters())):
                return net
        except ModelError:
            pass  # the model did load, so its files only spell or shape the tensors otherwise, or lack what was added
        # Some architectures fuse, split or rename what their files hold (mixtures of experts): write the
        # trainable start weights once more, under the model's own names, into a folder that goes with the net.
        spool = _spool(model)
        try:
            net = cls(model, tokenizer, spool, trainable, remember)
        except BaseException:
            shutil.rmtree(spool, ignore_errors=True)
            raise
        net.folder = folder
        weakref.finalize(net, shutil.rmtree, spool, ignore_errors=True)
        return net

    @property
    def model(self) -> PreTrainedModel:
        """The resident model."""
        self._wake()
        return self._model

    def rest(self) -> None:
        """Give up the memory of the trainable weights until somebody asks for them; they are undefined then."""
        self._resting = True
        for parameter in self._parameters.values():
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)

    def _wake(self) -> None:
        if self._resting:
            self._resting = False
            for parameter in self._parameters.values():
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self._parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first trainable parameter; a model may keep a few in another."""
        return next(iter(self._parameters.values())).dtype

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have; None where the model's config sets no end."""
        return positions(self.model)

    @property
    def rows(self) -> tuple[int, int]:
        """How many tokens the model can read, and how many it can say (a classifier: as many): those of its
        embedding's rows and of its head's."""
        read = int(self.model.get_input_embeddings().weight.shape[0])
        written = None if head.is_classifier(self.model) else self.model.get_output_embeddings()
        return read, read if written is None else int(written.weight.shape[0])

    def parameter(self, name: str) -> nn.Parameter:
        """The trainable parameter of that name; KeyError if there is none."""
        self._wake()
        return self._parameters[name]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of each trainable parameter, in the order of `names`."""
        self._wake()
        return iter(self._parameters.items())

    @torch.no_grad()
    def reset(self) -> None:
        """Weights := base, tensor by tensor, in place."""
        for name, parameter in self.parameters():
            parameter.copy_(self.base[name])

    @torch.no_grad()
    def state_sha256(self) -> str:
        """SHA-256 over name, dtype, shape and little-endian bytes of all parameters, also frozen, sorted by name."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
            digest.update(_bytes(parameter))
        return digest.hexdigest()

    def rebuild(self, token: bytes, build: Callable[[], None]) -> None:
        """Bring the weights that `token` stands for into the workspace.

        `token` is a hash of what was received. The weights come from the kept copy if it is of that token,
        else `build` is called to write them. With `remember` the result is then kept, in place of what was
        kept before, so that the next simulated client's fill is one copy.
        """
        if self._kept is not None and self._kept[0] == token:
            with torch.no_grad():
                for name, tensor in self._kept[1].items():
                    self.parameter(name).copy_(tensor)
            return
        build()
        if self.remember:
            copies = self._kept[1] if self._kept is not None else {}
            self._kept = None  # if the copying below is interrupted, nothing half-new passes for the old
            for name, parameter in self.parameters():
                if name in copies:
                    copies[name].copy_(parameter.detach())
                else:
                    copies[name] = parameter.detach().clone()
            self._kept = (token, copies)

    def forget(self) -> None:
        """Drop the kept copy and its memory."""
        self._kept = None

    def save(self, folder: Path | str, card: str | None = None) -> None:
        """Write a Hugging Face folder (safetensors, config, tokenizer) that appears whole or not at all.

        `card` is what its README.md says. Of a LoRA view, the plain model with the factors merged in; and in its folder
        `adapter` the factors alone. An older model folder of that name is replaced. ModelError: something
        else is there.
        """
        target = Path(folder)
        if (
            target.exists()
            and not (target / "config.json").is_file()
            and (not target.is_dir() or any(target.iterdir()))
        ):
            raise ModelError(f"will not replace {folder}: it is not a model folder")
        config = self.model.config
        cached, config.use_cache = config.use_cache, True  # off in training; who serves the folder wants the cache
        try:
            with quiet(), whole_folder(target, replace=True) as fresh:
                if lora.has_lora(self.model):
                    lora.plain(self.model).save_pretrained(fresh, state_dict=lora.merged(self.model))
                    lora.save_adapter(self.model, fresh / "adapter")
                else:
                    self.model.save_pretrained(fresh)
                self.tokenizer.save_pretrained(fresh)
                if card is not None:
                    (fresh / "README.md").write_text(card, encoding="utf-8")
        finally:
            config.use_cache = cached


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter, under its first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def _spellings(model: PreTrainedModel, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, and each with and without the prefix of the headless model, as some files are written."""
    prefix = f"{model.base_model_prefix}."
    return (
        *names,
        *(name.removeprefix(prefix) if name.startswith(prefix) else prefix + name for name in names),
    )


def _spool(model: PreTrainedModel) -> Path:
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


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's raw little-endian bytes, without a copy where it lies in memory so."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(_RAW[tensor.element_size()])
    raw = flat.numpy()
    return memoryview(raw.astype(raw.dtype.newbyteorder("<"), copy=False)).cast("B")
