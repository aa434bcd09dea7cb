"""A part of a model's own parameters: norms and biases (BitFit, Ben Zaken et al., 2022), a few layers, the head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from thinwire.model.views.view import Source, Table

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from thinwire.keys import Key


class Filter(Table):
    """The parameters in whose name a word between dots is, or ends with _ and, one of `parts`; case does not matter.

    A part with * in it is a pattern of whole names, such as model.layers.29.*, as those of `keep`.
    """

    forward_share: ClassVar[float] = 2 / 3  # the gradient of most weights falls away
    factors: ClassVar[None] = None
    float32: ClassVar[bool] = False
    trains: ClassVar[str] = "{} parameters of the model's own"

    kind: Literal["filter"] = "filter"
    parts: tuple[str, ...] = Field(("norm", "layernorm", "ln", "bias"), min_length=1)
    keep: tuple[str, ...] = ()  # patterns of names, such as *.B, of what stays at each client

    def adapt(self, model: PreTrainedModel, key: Key, source: Source | None = None) -> None:
        """Freeze the others. ModelError: a part that no name has."""
        chosen = {id(parameter) for _, parameter in self._chosen(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)

    def trained(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Those whose name has a part."""
        return {name: tuple(parameter.shape) for name, parameter in self._chosen(model)}

    def _chosen(self, model: PreTrainedModel) -> Iterable[tuple[str, nn.Parameter]]:
        from thinwire.model.errors import ModelError

        found = {name: parameter for name, parameter in model.named_parameters() if self._has(name)}
        if not found:
            known = sorted({part for name, _ in model.named_parameters() for part in name.split(".")[-2:]})
            wanted = " or ".join(self.parts)
            raise ModelError(f"model.view.parts: no parameter is called {wanted}; there are: {', '.join(known)}")
        return found.items()

    def _has(self, name: str) -> bool:
        if any("*" in part and fnmatchcase(name, part) for part in self.parts):
            return True
        ends = "|".join(re.escape(part) for part in self.parts if "*" not in part) or r"\Z."
        return any(re.fullmatch(rf"(.*[_\W])?({ends})(_?\d+)?", part, re.IGNORECASE) for part in name.split("."))
