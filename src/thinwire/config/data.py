"""[data] of a run file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_serializer, model_validator

from thinwire.config.section import Section
from thinwire.errors import ConfigError


class Data(Section):
    """The clients' rows, and how they are shown to the model.

    A source is a .jsonl, .csv, .tsv or .parquet file, a packaged set, or a Hugging Face data set: a folder that
    save_to_disk wrote, or a name such as nyu-mll/glue:sst2@validation (subset and split may be left out). `path`: a
    source to be partitioned, or a folder of files, one a client. `partition`: files, iid, size (sizes follow
    Dirichlet(alpha)), dirichlet (skew of `column`), column (a client a value of `column`, all or those in `values`) or
    task (the values of `column` dealt whole to `clients`). `template` names a prompt template; `prompt` and `answer`
    are format strings over the columns instead of it, with `template = "jinja"` Jinja templates. With `choices` the
    answers are a closed set, scored against each other; `loss = "answer"` trains on the answer's tokens all the same.
    `loss = "dpo"` trains on preferences, rows with an answer in `chosen` and one in `rejected`, by how much the first
    gains on the second over what the start model has, times `beta`; a format string of your own for the second is
    `rejected`. `loss = "contrastive"` trains an encoder's embeddings on pairs, rows with an `anchor`, its `positive`
    and maybe a `negative` (or `prompt`, `answer` and `rejected` of your own): each anchor's own positive against all of
    the batch, their cosines times `scale`.
    For a classifier the prompt is the text, by default the column `input`, the answer its class, and `choices` the
    classes, found in the clients' rows where it is None. `words` replaces the values of the answer's column, such
    as labels by the words that stand for them. `balanced`: a client's batches hold the answers of a closed set in
    equal numbers, however skewed its rows are. `pack`: short examples share a row of up to max_length tokens, and
    do not see each other; batch_size then counts such rows. `order` in which a client's rows come: random, or lfr
    (learn, focus, review): passes over all of them and over the `focus` share of the highest losses, in turn.
    """

    path: str
    partition: Literal["files", "iid", "size", "dirichlet", "column", "task"] = "iid"
    column: str = "output"
    values: tuple[str, ...] | None = Field(None, min_length=1)  # of the column that are clients; all where it is None
    clients: PositiveInt = 8
    alpha: PositiveFloat = 1.0
    minimum: PositiveInt = 1  # rows that each client gets at least, under dirichlet and size
    rows: PositiveInt | None = None  # use that many rows at most (all clients together), drawn at random
    heldout: float | int | str = 0.1  # a share or a number of the rows, or a source
    heldout_tasks: str | None = None  # a source: tasks that no client holds
    template: Literal["plain", "alpaca", "chat", "completion", "text", "jinja"] = "plain"
    prompt: str | None = None
    answer: str | None = None
    choices: tuple[str, ...] | None = None
    loss: Literal["choice", "answer", "dpo", "contrastive"] = "choice"
    rejected: str | None = None
    beta: float = Field(default=0.1, gt=0)
    scale: float = Field(default=20.0, gt=0)
    words: dict[str, str] | None = None
    balanced: bool = False
    max_length: int = Field(default=512, ge=2)  # prompt and answer have a token each at least
    too_long: Literal["answer", "cut", "drop"] = "answer"  # of rows beyond max_length cut the answer, or prompts too
    pack: bool = False
    order: Literal["random", "lfr"] = "random"
    focus: float = Field(default=0.5, gt=0, le=1)  # of lfr; 1: every pass is over all rows
    shuffle_answers: bool = False  # a control: what is learnt then is only format
    pooled: bool = False  # a reference: all the clients' rows with one client
    public: str | None = None  # a source whose rows the server holds, for checks and calibration
    validation: float = Field(default=0.0, ge=0, lt=1)  # score on this share of the clients' rows, not on held-out ones
    selection: float | str | None = None  # a share of the clients' rows, or a source: it chooses the round

    @field_validator("heldout")
    @classmethod
    def _heldout(cls, value: float | int | str) -> float | int | str:
        if not isinstance(value, str) and (value < 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError(f"{value} is neither a share below 1, a number of rows nor a source")
        return value

    @field_validator("selection")
    @classmethod
    def _selection(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"{value} is neither a share between 0 and 1 nor a source")
        return value

    @field_validator("choices")
    @classmethod
    def _choices(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < 2:
            raise ValueError(f"needs at least two different answers, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _pairs(self) -> Data:
        for lacking, other in (("prompt", "answer"), ("answer", "prompt")):
            if getattr(self, lacking) is None and getattr(self, other) is not None:
                raise ConfigError(f"data.{lacking}: missing; it goes together with data.{other}")
        if self.template == "jinja" and self.prompt is None:
            raise ConfigError('data.prompt: missing; with data.template = "jinja" it is a Jinja template')
        if self.pack and self.choices is not None and self.loss == "choice":
            raise ConfigError(
                'data.pack: goes with open answers, or data.loss = "answer"; choices are scored a row each'
            )
        if self.pack and self.balanced:
            raise ConfigError("data.pack: does not go with data.balanced")
        self._objective()
        if self.order != "lfr" and self.focus != 0.5:
            raise ConfigError('data.focus: goes with data.order = "lfr" only')
        if self.values is not None and self.partition != "column":
            raise ConfigError('data.values: goes with data.partition = "column" only')
        return self

    def _objective(self) -> None:
        dpo, contrastive = self.loss == "dpo", self.loss == "contrastive"
        for name, unset, fits, which in (
            ("rejected", None, dpo or contrastive, '"dpo" or "contrastive"'),
            ("beta", 0.1, dpo, '"dpo"'),
            ("scale", 20, contrastive, '"contrastive"'),
        ):
            if getattr(self, name) != unset and not fits:
                raise ConfigError(f"data.{name}: goes with data.loss = {which} only")
        if not dpo and not contrastive:
            return
        for name in ("choices", "words", "balanced", "pack", "shuffle_answers"):
            if getattr(self, name) not in (None, False):
                why = f'data.loss = "{self.loss}", whose {"answers" if dpo else "texts"} come in pairs'
                raise ConfigError(f"data.{name}: does not go with {why}")
        together = f'with data.loss = "{self.loss}" it goes together with'
        if self.rejected is not None and self.prompt is None:
            raise ConfigError(f"data.prompt: missing; {together} data.rejected")
        if dpo and self.rejected is None and self.prompt is not None:
            raise ConfigError(f"data.rejected: missing; {together} data.prompt")
        if contrastive and self.order == "lfr":
            raise ConfigError("data.order: lfr is about each row's own loss, and a pair's depends on its batch")
        if contrastive and self.template not in ("plain", "jinja"):
            raise ConfigError(
                'data.template: does not go with data.loss = "contrastive", which reads anchor, positive and negative, '
                "or data.prompt, data.answer and data.rejected"
            )

    @model_serializer(mode="wrap")
    def _short(self, plain: Any) -> dict[str, Any]:
        found: dict[str, Any] = plain(self)
        # as run files had it before there were preferences and pairs
        absent = {"dpo": ["scale"], "contrastive": ["beta"]}.get(self.loss, ["rejected", "beta", "scale"])
        for name in absent:
            found.pop(name, None)
        return found
