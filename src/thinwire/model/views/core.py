"""The core view: between two fixed random matrices beside a layer stands a small square one, which alone is trained.

W x becomes W x + (alpha / rank) U C V x. C [rank, rank] is 0 at first. U [out, rank] is of signs and V [rank, in] of
signs over sqrt(in), drawn from the run's key for the layer's name: the same at every end, and they never travel. For an
x whose entries have a mean square of 1 so have those of V x, and each column of U gives all of an entry to every
output: 1 in one entry of C moves each output by about alpha / rank, and entries of size c with random signs move it by
about alpha c, whatever the layer's size and, the latter, whatever the rank.

It is LoRA-XS's parametrisation (Balazy et al., 2024, arXiv:2405.17604), which Fed-SB (Singhal et al., 2025,
arXiv:2502.15436) averages: the mean of cores is the core of the mean, as it is not with LoRA's factors. There U and V
come from the singular vectors of W or of a first gradient; here nothing has to be computed or sent for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from thinwire.model.views.view import Source, Table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from thinwire.keys import Key


class Core(Table):
    """A square of `rank` between fixed factors beside every linear layer whose name ends in one of `targets`."""

    trains: ClassVar[str] = "{} numbers of cores"
    float32: ClassVar[bool] = False
    forward_share: ClassVar[float] = 2 / 3  # the gradient of the weights falls away, a third of a step

    kind: Literal["core"] = "core"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    keep: tuple[str, ...] = ()  # patterns of names of what stays at each client

    # what is done is in the module `factors`, which imports torch: a run file is read without it
    @property
    def factors(self) -> tuple[int, tuple[str, ...]]:
        """The rank of U and V, and beside which layers they stand."""
        return self.rank, self.targets

    def adapt(self, model: PreTrainedModel, key: Key, source: Source | None = None) -> None:
        """See factors.add_cores."""
        from thinwire.model.views import factors

        factors.add_cores(model, self.rank, self.alpha, self.targets, key)

    def trained(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """The cores, and a classifier's head."""
        from thinwire.model.views import factors

        return factors.core_shapes(model, self.rank, self.targets)

    def export(self, model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
        """V and U C as LoRA's factors into `adapter`, for peft; the state with the product merged in."""
        from thinwire.model.views import factors

        factors.save(model, {"r": self.rank, "lora_alpha": self.alpha}, folder / "adapter")
        return factors.merged(model)
