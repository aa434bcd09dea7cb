"""The tied view: each entry of what is trained follows one of a few numbers, by a map that the run's key draws.

    entry = start + sign x numbers[index]

Uni-LoRA (Li et al., 2025, arXiv:2506.00799) ties the entries of LoRA factors so, up to a norm. Tied straight over all
weights it is FedKSeed's model with directions of disjoint support, w = w0 + sum_j numbers[j] z_j, but for the gradient,
which one backward pass gives for all of them at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from thinwire.errors import ConfigError
from thinwire.model.views.view import Adapted, Source, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from thinwire.keys import Key

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Tied(Table):
    """`numbers` that the entries of LoRA factors follow, or those of all weights: `over`."""

    float32: ClassVar[bool] = True

    kind: Literal["tied"] = "tied"
    numbers: int = Field(115200, ge=1, le=1 << 24)
    over: Literal["factors", "weights"] = "factors"
    rank: PositiveInt = 4
    alpha: PositiveFloat = 8.0
    targets: tuple[str, ...] = Field(LAYERS, min_length=1)
    keep: tuple[str, ...] = Field((), exclude=True)  # nothing: numbers have no parts

    @field_validator("keep")
    @classmethod
    def _whole(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            raise ConfigError("model.view.keep: the numbers of a tied view have no parts, so none can stay at a client")
        return value

    # what is done is in `factors` and `ties`, which import torch: a run file is read without them
    @property
    def forward_share(self) -> float:
        """Of a step on all weights: the gradient of the weights falls away beside factors, a third of a step."""
        return 2 / 3 if self.over == "factors" else 1.0

    @property
    def trains(self) -> str:
        """So many numbers, and who follows them."""
        return "{} numbers, which " + ("LoRA factors follow," if self.over == "factors" else "all weights follow,")

    @property
    def factors(self) -> tuple[int, tuple[str, ...]] | None:
        """The rank of the factors, and beside which layers they stand."""
        return (self.rank, self.targets) if self.over == "factors" else None

    def adapt(self, model: PreTrainedModel, key: Key, source: Source | None = None) -> None:
        """See tying.tie."""
        from thinwire.model.views import factors, tying

        if self.over == "factors":
            factors.add(model, self.rank, self.alpha, self.targets, key)
        tying.tie(model, self.numbers, key, kept=self.over == "factors")

    def start(self, model: PreTrainedModel, base: Mapping[str, Tensor]) -> None:
        """Entries of weights begin where the start model's files have them, and are not held twice."""
        from thinwire.model.views import tying

        if self.over == "weights":
            tying.of(model).base = base

    def refresh(self, model: PreTrainedModel) -> None:
        """Write what follows the numbers, where a pass has not done it."""
        from thinwire.model.views import tying

        tying.of(model).follow()

    def trained(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """The numbers."""
        from thinwire.model.views import factors, tying

        if self.over == "factors":
            factors.shapes(model, self.rank, self.targets)  # refuses what `adapt` would
        return {tying.NAME: (self.numbers,)}

    def adapted(self, model: PreTrainedModel) -> dict[str, Adapted]:
        """Each layer that has factors."""
        from thinwire.model.views import factors

        return factors.places(model)

    def export(self, model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
        """The factors alone into `adapter`, for peft; the state with the numbers, and the factors, merged in."""
        from thinwire.model.views import factors, tying

        self.refresh(model)
        if self.over == "factors":
            factors.save(model, {"r": self.rank, "lora_alpha": self.alpha}, folder / "adapter")
        return {name: tensor for name, tensor in factors.merged(model).items() if name != tying.NAME}
