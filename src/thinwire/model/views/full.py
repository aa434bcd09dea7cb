"""The view of a model that is the model: every parameter is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from thinwire.model.views.view import Adapted, Source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from thinwire.keys import Key


class Full(BaseModel):
    """All parameters are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    forward_share: ClassVar[float] = 1.0

    kind: Literal["full"] = "full"
    keep: tuple[str, ...] = ()  # patterns of names, such as *.B, of what stays at each client
    trains: ClassVar[str] = "all {} parameters"
    factors: ClassVar[None] = None
    float32: ClassVar[bool] = False
    front: ClassVar[int] = 0

    def adapt(self, model: PreTrainedModel, key: Key, source: Source | None = None) -> None:
        """Nothing to put in."""

    def start(self, model: PreTrainedModel, base: Mapping[str, Tensor]) -> None:
        """Nothing is read."""

    def refresh(self, model: PreTrainedModel) -> None:
        """Nothing follows."""

    def trained(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Every parameter."""
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def adapted(self, model: PreTrainedModel) -> dict[str, Adapted]:
        """None."""
        return {}

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        """Nothing stands apart."""
