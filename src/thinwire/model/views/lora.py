"""The LoRA view of a model (Hu et al., 2022, arXiv:2106.09685): small factors beside chosen layers, all else frozen.

W x becomes W x + (alpha / rank) B A x with A [rank, in] and B [out, rank]. Whatever trains a net's parameters then
trains A and B, and sends no more than these.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_serializer

from thinwire.model.views.view import Adapted, Source, Table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from thinwire.keys import Key


class Lora(Table):
    """Factors of `rank` beside every linear layer whose name ends in one of `targets`, scaled by alpha / rank.

    `freeze_a`: A stays as the run's seed draws it, and B alone is trained (FFA-LoRA, Sun et al. 2024,
    arXiv:2403.12313): the mean of the factors is then the factor of the mean product, and half as much travels.
    """

    trains: ClassVar[str] = "{} LoRA factors"
    float32: ClassVar[bool] = False
    forward_share: ClassVar[float] = 2 / 3  # the gradient of the weights falls away, a third of a step

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    targets: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    keep: tuple[str, ...] = ()  # patterns of names, such as *.B, of what stays at each client
    freeze_a: bool = False

    @model_serializer(mode="wrap")
    def _short(self, plain: Any) -> dict[str, Any]:
        found: dict[str, Any] = plain(self)
        if not self.freeze_a:
            del found["freeze_a"]  # a run without it is the one that it was before there was this field
        return found

    # what is done is in the module `factors`, which imports torch: a run file is read without it
    @property
    def factors(self) -> tuple[int, tuple[str, ...]]:
        """Their rank, and beside which layers they stand."""
        return self.rank, self.targets

    def adapt(self, model: PreTrainedModel, key: Key, source: Source | None = None) -> None:
        """See factors.add."""
        from thinwire.model.views import factors

        factors.add(model, self.rank, self.alpha, self.targets, key)
        if self.freeze_a:
            for place in factors.places(model).values():
                model.get_parameter(place.left).requires_grad_(False)

    def trained(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """The factors, and a classifier's head."""
        from thinwire.model.views import factors

        found = factors.shapes(model, self.rank, self.targets)
        return {name: shape for name, shape in found.items() if not (self.freeze_a and ".lora_A." in name)}

    def adapted(self, model: PreTrainedModel) -> dict[str, Adapted]:
        """Each layer that has factors."""
        from thinwire.model.views import factors

        return factors.places(model)

    def export(self, model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
        """The factors alone into `adapter`, for peft; the state with the factors merged in."""
        from thinwire.model.views import factors

        factors.save(model, {"r": self.rank, "lora_alpha": self.alpha}, folder / "adapter")
        return factors.merged(model)
