"""What of a model is trained, whatever trains it: all of it, or a few parameters that are put into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from thinwire.keys import Key


PROMPT = Path("adapter", "virtual_tokens.safetensors")  # in a model's folder: the prompt that belongs to its weights


class Source(NamedTuple):
    """Where a model is from: its tokenizer, and the folder with its files."""

    tokenizer: PreTrainedTokenizerBase
    folder: Path


class Adapted(NamedTuple):
    """A layer with factors beside it, by the names of its parameters: it computes with `weight` + scale right left.

    left: [rank, in], right: [out, rank], weight: [out, in], or turned over where the layer holds it so.
    """

    weight: str
    left: str
    right: str
    scale: float


class View(Protocol):
    """A frozen table of a run file, known by its `kind`; its fields are its settings."""

    @property
    def kind(self) -> str:
        """What it is called in a run file."""

    @property
    def forward_share(self) -> float:
        """Of the passes of a step on all weights, the share that a step on this view takes."""

    @property
    def front(self) -> int:
        """How many positions it takes in front of every row."""

    @property
    def keep(self) -> tuple[str, ...]:
        """Patterns of the names of what is trained at the clients and stays there, see keep.kept."""

    def model_dump_json(self) -> str:
        """The table as JSON."""

    @property
    def trains(self) -> str:
        """What is trained, for people; {} stands for how many there are."""

    @property
    def float32(self) -> bool:
        """Whether what is trained is so, whatever the model's dtype."""

    @property
    def factors(self) -> tuple[int, tuple[str, ...]] | None:
        """The rank of the factors that it puts beside layers, and beside which; None: it puts none."""

    def adapt(self, model: PreTrainedModel, key: Key, source: Source | None = None) -> None:
        """Put what is trained into the model, drawn from `key`, in place; requires_grad then says what is trained.

        `source` is for a view that begins at words, or at what a hollow model has in its files alone.

        ModelError: the model has no place for it.
        """

    def start(self, model: PreTrainedModel, base: Mapping[str, Tensor]) -> None:
        """Keep at hand what it reads of the start weights, if anything: `base` has them by name."""

    def refresh(self, model: PreTrainedModel) -> None:
        """Bring what follows from the trained parameters up to them, as a forward pass does."""

    def trained(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """The shapes, by name, of what is trained once a model has been adapted that is now not, and may be empty."""

    def adapted(self, model: PreTrainedModel) -> dict[str, Adapted]:
        """The layers of an adapted model that have factors beside them, by name."""

    def export(self, model: PreTrainedModel, folder: Path) -> dict[str, Tensor] | None:
        """Write what stands apart from the model into the folder; the state of the plain model that computes the same.

        None: that is the model's own state.
        """


class Table(BaseModel):
    """What most views have in common: nothing is read of the start weights, follows, or stands beside a layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def front(self) -> int:
        """Nothing stands in front of a row."""
        return 0

    def start(self, model: PreTrainedModel, base: Mapping[str, Tensor]) -> None:
        """Nothing is read."""

    def refresh(self, model: PreTrainedModel) -> None:
        """Nothing follows."""

    def adapted(self, model: PreTrainedModel) -> dict[str, Adapted]:
        """None."""
        return {}

    def export(self, model: PreTrainedModel, folder: Path) -> dict[str, Tensor] | None:
        """Nothing stands apart."""
        return None
