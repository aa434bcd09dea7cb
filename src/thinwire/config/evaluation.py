"""[eval] of a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from thinwire.config.section import Section
from thinwire.errors import ConfigError


class Eval(Section):
    """Scoring of held-out rows: `every` so many rounds (0: before and after only), at most `rows` a split.

    After `patience` evaluations without a lower loss the run ends early (0: never), and where the loss has come down to
    `target`; `keep`: whether model/ then has the weights of the last round, or of the best: that of the lowest loss,
    the start among them. Rounds up to `warmup` are neither the best nor waited for. The loss is that of the split `on`,
    by default of the rows of data.selection, which no summary reports, or of the first split; sites: the mean of the
    clients' own evaluation.
    `prompts`: public texts, nobody's rows, whose answers a report shows. `show_rows`: records and reports may hold a
    few held-out rows, with what the model answers, too.
    """

    every: NonNegativeInt = 0
    rows: PositiveInt = 256
    batch_size: PositiveInt = 16
    generate: NonNegativeInt = 0  # rows a split that are generated for Rouge-L
    max_new_tokens: PositiveInt = 64
    prompts: tuple[str, ...] = ()
    show_rows: bool = False
    patience: NonNegativeInt = 0
    keep: Literal["last", "best"] = "last"
    on: str | None = None
    target: float | None = None
    warmup: PositiveInt | None = None

    @model_validator(mode="after")
    def _patience(self) -> Eval:
        if self.patience and not self.every:
            raise ConfigError("eval.patience: counts evaluations, so it goes together with eval.every")
        if self.target is not None and not self.every:
            raise ConfigError("eval.target: is compared with evaluations, so it goes together with eval.every")
        if not self.patience and self.target is None and self.keep == "last":
            for name in ("on", "warmup"):
                if getattr(self, name) is not None:
                    raise ConfigError(f'eval.{name}: goes with eval.patience, eval.target or eval.keep = "best"')
        return self
