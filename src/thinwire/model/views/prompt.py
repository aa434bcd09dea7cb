"""The prompt view: virtual tokens stand in front of every row, and they alone are trained (Lester et al., 2021).

    E(row) becomes [P; E(row)], P [tokens, width]          deep: layer l finds P_l in their places

All that a frozen model has of a task then lies in a few rows of its embedding space (arXiv:2104.08691). With `deep`
each layer has rows of its own in place of what the layer below has made of them, as in P-tuning v2 (Liu et al., 2022,
arXiv:2110.07602) and VPT-deep (Jia et al., 2022, arXiv:2203.12119): keys and values are what the layer's own
projections make of them, so it goes with every model that has a list of layers. Prefixes of keys and values are
another shape in each architecture's cache, and are not offered.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from thinwire.errors import ConfigError
from thinwire.model.views.view import PROMPT, Source, Table, View

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from thinwire.keys import Key


class Prompt(Table):
    """So many virtual `tokens` in front of a row; a classifier's head is trained with them.

    `init`: where they begin: at the embeddings of words of the vocabulary that the run's key draws; at those of a
    `text`, cut or repeated; at normal numbers; or where a run has left them, in the model folder's `adapter`. `deep`:
    each layer has its own.
    """

    trains: ClassVar[str] = "{} numbers of virtual tokens"
    float32: ClassVar[bool] = False
    forward_share: ClassVar[float] = 2 / 3  # the gradient of the weights falls away, a third of a step
    factors: ClassVar[None] = None

    kind: Literal["prompt"] = "prompt"
    tokens: int = Field(20, ge=1, le=1 << 12)
    init: Literal["vocabulary", "text", "normal", "adapter"] = "vocabulary"
    text: str | None = None
    deep: bool = False
    keep: tuple[str, ...] = ()  # patterns of names of what stays at each client

    @model_validator(mode="after")
    def _worded(self) -> Prompt:
        if (self.init == "text") != bool(self.text):
            raise ConfigError('model.view.text: goes together with model.view.init = "text"')
        return self

    # what is done is in the module `prompts`, which imports torch: a run file is read without it
    @property
    def front(self) -> int:
        """How many positions it takes in front of a row."""
        return self.tokens

    def adapt(self, model: PreTrainedModel, key: Key, source: Source | None = None) -> None:
        """See prompts.attach."""
        from thinwire.model.views import prompts

        prompts.attach(model, self.tokens, self.deep, prompts.Start(self.init, self.text or "", key, source))

    def trained(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """The virtual tokens of each layer that has some, and a classifier's head."""
        from thinwire.model.views import prompts

        return prompts.shapes(model, self.tokens, self.deep)

    def export(self, model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
        """The virtual tokens into `adapter`, for peft and for `init = "adapter"`; the state of the model below them."""
        from thinwire.model.views import prompts

        return prompts.save(model, folder / PROMPT.parent)


def saved_in(folder: Path) -> Prompt | None:
    """The prompt that belongs to the weights in a model's folder, if one does; ModelError for a file that is none."""
    if not (folder / PROMPT).is_file():
        return None
    from thinwire.model.views import prompts

    fronts = prompts.read(folder / PROMPT)
    return Prompt(tokens=fronts["0"].shape[0], init="adapter", deep=len(fronts) > 1)


def check_prompt(view: View, folder: Path, name: str) -> None:
    """Raise ModelError for a view that would leave out the prompt that belongs to a model's weights."""
    from thinwire.model.errors import ModelError

    if view.kind != "prompt" and (folder / PROMPT).is_file():
        raise ModelError(
            f"model.view: the weights of {name} go with the prompt in its folder {PROMPT.parent}: "
            'kind = "prompt" and init = "adapter" take both; else remove that folder'
        )
