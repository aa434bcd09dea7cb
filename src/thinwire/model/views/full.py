"""The view of a model that is the model: every parameter is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from thinwire.model.views.view import Source, Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from thinwire.keys import Key


class Full(Table):
    """All parameters are trained."""

    forward_share: ClassVar[float] = 1.0

    kind: Literal["full"] = "full"
    keep: tuple[str, ...] = ()  # patterns of names, such as *.B, of what stays at each client
    trains: ClassVar[str] = "all {} parameters"
    factors: ClassVar[None] = None
    float32: ClassVar[bool] = False

    def adapt(self, model: PreTrainedModel, key: Key, source: Source | None = None) -> None:
        """Nothing to put in."""

    def trained(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Every parameter, but for a pooler that has no part in embeddings."""
        return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
