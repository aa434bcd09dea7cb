"""What a run file may hold: a table each, frozen, with unknown fields refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NewType

import tomli_w
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializationInfo,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from thinwire.config.evaluation import Eval as Eval
from thinwire.config.explain import leaves
from thinwire.config.federation import Federation
from thinwire.config.method import method_of
from thinwire.config.privacy import Privacy
from thinwire.config.section import Section
from thinwire.errors import ConfigError
from thinwire.methods import PLACES
from thinwire.model.views import AnyView, Full, Lora
from thinwire.runtime.cohort import All, Cohort

if TYPE_CHECKING:
    from thinwire.core import Method
else:
    Method = NewType("Method", Any)  # the class comes with torch; `Run` sees to it itself that it has one


class Model(Section):
    """The start model. `path`: a Hugging Face folder, a hub name, a .gguf file, or what packages carry:
    smollm2-135m-instruct, minilm.

    `task`: causal (goes on with a text) or classification (names a text's class; an encoder gets a fresh head), found
    from the model where it is auto. `device`: as torch calls it, such as cpu or cuda:0; or auto, for a model that spans
    all GPUs of the machine. `view`: what all methods train, the model or, where its kind is lora, factors beside it and
    a classifier's head; linear layers may then be kept in 8 or 4 `bits` (LLM.int8, NF4). [model.lora] is short for it.
    `autocast`: a float32 model's products are in bfloat16 where the processor has those, and all else stays as it is.
    """

    path: str = "smollm2-135m-instruct"
    task: Literal["auto", "causal", "classification"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    lora: Lora | None = None
    bits: Literal[8, 4] | None = None
    autocast: bool = False
    view: AnyView = Full()

    @model_validator(mode="after")
    def _adapted(self) -> Model:
        if {"lora", "view"} <= self.model_fields_set and self.lora != self.view:
            raise ConfigError('model.lora: is short for [model.view] with kind = "lora"; one of them is enough')
        view = self.view if self.lora is None else self.lora
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "lora", view if isinstance(view, Lora) else None)
        if self.bits is not None and view.factors is None:
            raise ValueError("bits needs [model.lora]: quantised weights cannot be trained themselves")
        if self.autocast and self.dtype != "float32":
            raise ConfigError(f"model.autocast: is for float32 models; the products of {self.dtype} are already")
        return self

    @model_serializer(mode="wrap")
    def _short(self, plain: Any) -> dict[str, Any]:
        found: dict[str, Any] = plain(self)
        if not self.autocast:  # a run without is the one that it was before
            del found["autocast"]
        if isinstance(self.view, Full | Lora):  # as run files have them since before there were views
            found.pop("view", None)
            (found.get("lora") or {}).pop("kind", None)
        for table in (found.get("lora"), found.get("view")):
            if table is not None and not table.get("keep", True):  # a run without is the one that it was before
                del table["keep"]
        return found


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
    `rejected`.
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
    loss: Literal["choice", "answer", "dpo"] = "choice"
    rejected: str | None = None
    beta: float = Field(default=0.1, gt=0)
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
        if self.loss == "dpo":
            self._preferences()
        elif self.rejected is not None or self.beta != 0.1:
            raise ConfigError(
                f'data.{"beta" if self.rejected is None else "rejected"}: goes with data.loss = "dpo" only'
            )
        if self.order != "lfr" and self.focus != 0.5:
            raise ConfigError('data.focus: goes with data.order = "lfr" only')
        if self.values is not None and self.partition != "column":
            raise ConfigError('data.values: goes with data.partition = "column" only')
        return self

    def _preferences(self) -> None:
        for name in ("choices", "words", "balanced", "pack", "shuffle_answers"):
            if getattr(self, name) not in (None, False):
                raise ConfigError(f'data.{name}: does not go with data.loss = "dpo", whose answers come in pairs')
        if (self.rejected is None) != (self.prompt is None):
            lacking, other = ("rejected", "prompt") if self.rejected is None else ("prompt", "rejected")
            raise ConfigError(f'data.{lacking}: missing; with data.loss = "dpo" it goes together with data.{other}')

    @model_serializer(mode="wrap")
    def _short(self, plain: Any) -> dict[str, Any]:
        found: dict[str, Any] = plain(self)
        if self.loss != "dpo":  # as run files had it before there were preferences
            for name in ("rejected", "beta"):
                found.pop(name, None)
        return found


class Track(Section):
    """Experiment trackers that receive the run's numbers, each on this machine: extras of their names."""

    to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    project: str = "thinwire"


class Run(Section):
    """A whole run. `threads`: of torch and of the kernels; None leaves torch's choice."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegativeInt = 0
    rounds: PositiveInt = 10
    threads: int | None = Field(default=None, ge=1, le=1024)
    model: Model = Model()
    data: Data
    method: Method
    cohort: tuple[Cohort, ...] = (All(),)
    eval: Eval = Eval()
    track: Track = Track()
    federation: Federation | None = None
    privacy: Privacy | None = None
    environment: Mapping[str, str] = {}  # written by a run: for the reader, and to see that it goes on with the same

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return method_of(value)
        from thinwire.core import Method

        if not isinstance(value, Method):
            raise ValueError(f'must be a table, such as {{ name = "fedkseed" }}, got {value!r:.60}')
        return value

    @field_serializer("method")
    def _method_table(self, method: Method, info: SerializationInfo) -> dict[str, Any]:
        place = f"{type(method).__module__}:{type(method).__qualname__}"
        path = {} if place in PLACES.values() else {"path": place}
        return path | method.model_dump(mode=info.mode)

    @field_validator("cohort")
    @classmethod
    def _ends(cls, value: tuple[Cohort, ...]) -> tuple[Cohort, ...]:
        if not value:
            raise ValueError("needs at least one segment")
        for i, segment in enumerate(value[:-1]):
            if segment.rounds is None:
                raise ConfigError(f"cohort.{i}.rounds: missing; only the last segment may go without")
        return value

    def first_difference(self, other: Run) -> str | None:
        """The first field in which `other`, a run that began, differs; None if its checkpoints serve this one."""
        aside: Any = {
            "environment": True,
            "threads": True,
            "track": True,
            "federation": Federation.model_fields.keys() - {"sites", "weights"},
        }
        mine, theirs = (dict(leaves(r.model_dump(exclude=aside))) for r in (self, other))
        for key in dict.fromkeys([*mine, *theirs]):
            if mine.get(key) != theirs.get(key):
                return f"{key} is {theirs.get(key)!r} there, {mine.get(key)!r} here"
        return None

    def to_toml(self, exclude: Any = None) -> str:
        """The file of this run with every default filled in, but for fields that pydantic is to `exclude`."""
        return tomli_w.dumps(without_none(self.model_dump(mode="json", exclude=exclude)))


def without_none(value: Any) -> Any:
    """A tree without what is None, which TOML has no word for."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value]
    return value
