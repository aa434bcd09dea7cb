"""A model as a flat, named list of trainable tensors, and the start model beside it on disk."""

from __future__ import annotations

import hashlib
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thinwire.keys import Key
from thinwire.model import classifier, embedder
from thinwire.model.errors import ModelError, first_line
from thinwire.model.folder import check_replaceable, whole_folder
from thinwire.model.load import load
from thinwire.model.quantised import plain
from thinwire.model.start import Base, spool, tied
from thinwire.model.tokens_and_generation import caching, quiet
from thinwire.model.trial import check_causal, positions
from thinwire.model.views import Adapted, Full, Source, View, check_prompt
from thinwire.model.views.keep import kept
from thinwire.wire.frame import raw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FULL, _SEED_0 = Full(), Key.root(0)


class Net:
    """A borrowed workspace: one resident model and the read-only start model beside it on disk.

    Its contents are undefined when borrowed. Every write is in place, and reaches the trainable parameters
    only: frozen ones stay as they were loaded, unless `write` is given their names, and so do buffers.

    What its view keeps at the clients is trained too, and is `personal`: no name, number or byte of it is among those
    that all share, which are `names`, `parameters` and `size`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path | str,
        trainable: Callable[[str], bool] | None = None,
        remember: bool = False,
        head_key: Key | None = None,
        view: View = _FULL,
        spooled: Path | None = None,
        view_key: Key = _SEED_0,
    ) -> None:
        """Wrap `model`, adapted to `view`, whose start weights lie in `folder`, those it spells otherwise in `spooled`.

        `trainable` picks by name the parameters that are trained (None: all); the others are frozen, as are those
        that do not require a gradient already. A tied parameter is one, under its first name, and trained if
        any of its names is chosen. `remember` lets `rebuild` keep a copy of one set of weights. What a classifier's
        files lack of its head is drawn from `head_key`. ModelError: nothing is trainable, or see Base.
        """
        self._model, self.tokenizer, self.folder, self.view = model, tokenizer, Path(folder), view
        self.remember, self.view_key = remember, view_key
        self.merged: tuple[str, ...] = ()  # of each stage that has gone into the frozen weights, its name
        self._kept: tuple[bytes, dict[str, Tensor]] | None = None
        for name, names in tied(model).items():
            if trainable is not None and not any(map(trainable, names)):
                model.get_parameter(name).requires_grad_(False)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.personal = {name: self._parameters.pop(name) for name in kept([*self._parameters], view.keep)}
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self._resting, self._written = False, dict[str, nn.Parameter]()  # frozen ones that were written to
        if not self._parameters:
            raise ModelError(f"no parameter of the model in {folder} is trainable")
        self.names: tuple[str, ...] = tuple(self._parameters)
        draw = None if head_key is None else lambda names: classifier.drawn(model, names, head_key)
        self.base = Base([*([spooled] if spooled else []), self.folder], model, draw)
        view.start(model, self.base)
        self.size = sum(p.numel() for p in self._parameters.values())
        self.nbytes = sum(p.numel() * p.element_size() for p in self._parameters.values())

    @classmethod
    def open(
        cls,
        path: str | Path,
        dtype: str = "float32",
        trainable: Callable[[str], bool] | None = None,
        remember: bool = False,
        device: str = "cpu",
        view: View = _FULL,
        hollow: bool = False,
        classes: Sequence[str] | None = None,
        head_key: Key | None = None,
        bits: int | None = None,
        view_key: Key = _SEED_0,
        embeds: bool = False,
    ) -> Net:
        """Load the model at `path` (see load.load) onto `device` and wrap it. ModelError as there.

        Device auto: all GPUs of the machine, each with some layers. `bits`, 8 or 4: linear layers are quantised, for
        `view` to add what is trained, drawn from `view_key`.
        A `hollow` net has names, shapes, config, tokenizer and base, and in memory only what its view adds: for halves
        that build a smaller model of their own or need no weights. With `classes`, or if it `embeds`: see load.load.
        """
        head_key = None if classes is None else head_key  # a causal model's head is in its files, or it is no model
        model, tokenizer, folder = load(path, dtype, hollow, classes, head_key, device, bits, embeds)
        to = None if hollow or device == "auto" or bits is not None else device
        return cls.over(model, tokenizer, folder, str(path), view, view_key, to, head_key, trainable, remember, hollow)

    @classmethod
    def over(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        name: str,
        view: View = _FULL,
        view_key: Key = _SEED_0,
        device: str | None = None,
        head_key: Key | None = None,
        trainable: Callable[[str], bool] | None = None,
        remember: bool = False,
        hollow: bool = False,
    ) -> Net:
        """Adapt a model that is as load.load gave it, in place, and wrap it. ModelError as `open`.

        `name`: the model's, for people. `device`: where it goes, None: it stays where it is.
        """
        check_prompt(view, folder, name)
        view.adapt(model, view_key, Source(tokenizer, folder))
        try:
            if device is not None:
                model.to(device)  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:  # no such device, or a torch without it
            raise ModelError(f"model.device: {device}: {first_line(error)}") from None
        if not hollow and not classifier.is_classifier(model) and not embedder.is_embedder(model):
            check_causal(model, name)
        try:
            net = cls(model, tokenizer, folder, trainable, remember, head_key, view, view_key=view_key)
            if hollow or net.base.starts_like(dict(net.trained())):
                return net
        except ModelError:
            if any(p.is_meta for p in model.parameters() if p.requires_grad):
                raise
            # the model did load, so its files only spell or shape the tensors otherwise, or lack what was added
        # such as mixtures of experts: their start weights once more, under the model's names, in a folder of the net's
        spooled = spool(model)
        try:
            net = cls(model, tokenizer, folder, trainable, remember, None, view, spooled, view_key)
        except BaseException:
            shutil.rmtree(spooled, ignore_errors=True)
            raise
        weakref.finalize(net, shutil.rmtree, spooled, ignore_errors=True)
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
        """How many tokens the model can read, and can write (a classifier: as many): rows of embedding and head."""
        model: Any = self.model
        read = int(model.get_input_embeddings().weight.shape[0])
        written = None if classifier.is_classifier(model) else model.get_output_embeddings()
        return read, read if written is None else int(written.weight.shape[0])

    def parameter(self, name: str) -> nn.Parameter:
        """The trainable parameter of that name; KeyError if there is none."""
        self._wake()
        return self._parameters[name]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of each trainable parameter, in the order of `names`."""
        self._wake()
        return iter(self._parameters.items())

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that a client trains: those of `parameters`, then its personal ones."""
        yield from self.parameters()
        yield from self.personal.items()

    def adapted(self) -> dict[str, Adapted]:
        """The layers with factors beside them, by name: their frozen weights, which `base` and `write` reach too."""
        return self.view.adapted(self._model)

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor) -> None:
        """The parameter of that name := the tensor, in place; also a frozen one, in floats, that `base` has.

        KeyError, ModelError: there is none. Once written, a frozen one is reset and remembered with the others.
        """
        if name in self._frozen and name not in self._written:
            if not torch.equal(self.base[name], self._frozen[name]):
                raise ModelError(f"{name} is not in the model's files as the model has it")  # to bring it back from
            self._written[name] = self._frozen[name]
        parameter = self._written[name] if name in self._written else self.parameter(name)
        if tensor.shape != parameter.shape:
            raise ModelError(f"{name} has the shape {tuple(parameter.shape)}, not {tuple(tensor.shape)}")
        parameter.copy_(tensor)

    @torch.no_grad()
    def reset(self) -> None:
        """Weights := base, tensor by tensor, in place, and nothing is merged into them."""
        if self.merged:
            self.restart(())
        for name, parameter in (*self.trained(), *self._written.items()):
            parameter.copy_(self.base[name])

    @torch.no_grad()
    def restart(self, merged: tuple[str, ...]) -> None:
        """After these stages what is trained begins anew, as the view draws it from a key of each stage's own."""
        from thinwire.model.views.merging import redraw

        redraw(self.model, self.view_key.fold("stage", len(merged)) if merged else self.view_key)
        self.base.begin({name: p.detach().cpu().clone() for name, p in self.trained()} if merged else {})
        self.merged = merged

    @torch.no_grad()
    def state_sha256(self) -> str:
        """SHA-256 over name, dtype, shape and little-endian bytes of all parameters, also frozen, sorted by name."""
        self.view.refresh(self.model)
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
            digest.update(raw(parameter))
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
                    self.write(name, tensor)
            return
        build()
        if self.remember:
            copies = self._kept[1] if self._kept is not None else {}
            self._kept = None  # if the copying below is interrupted, nothing half-new passes for the old
            for name, parameter in (*self.parameters(), *self._written.items()):
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

        `card` is its README.md. Of a view, the plain model that computes the same, and what the view exports
        beside it. An older model folder of that name is replaced. ModelError: something else is there.
        """
        check_replaceable(Path(folder))
        with quiet(), caching(self.model), whole_folder(Path(folder), replace=True) as fresh:
            plain(self.model).save_pretrained(fresh, state_dict=self.view.export(self.model, fresh))
            if any(not torch.equal(p, self.base[name]) for name, p in self._written.items()):
                shutil.rmtree(fresh / "adapter", ignore_errors=True)  # it would be for weights that are no more
            self.tokenizer.save_pretrained(fresh)
            embedder.describe(self.model, self.folder, fresh)
            if card is not None:
                (fresh / "README.md").write_text(card, encoding="utf-8")
