"""What a run file may hold: a table each, frozen, with unknown fields refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NewType

import tomli_w
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializationInfo,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from thinwire.config.data import Data as Data
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


SHARDED = ("full", "filter", "lora")  # kinds of views that are trained in shards


class Model(Section):
    """The start model. `path`: a Hugging Face folder, a hub name, a .gguf file, or what packages carry:
    smollm2-135m-instruct, minilm.

    `task`: causal (goes on with a text) or classification (names a text's class; an encoder gets a fresh head), found
    from the model where it is auto. `device`: as torch calls it, such as cpu or cuda:0; or auto, for a model that spans
    all GPUs of the machine. `view`: what all methods train, the model or, where its kind is lora, factors beside it and
    a classifier's head; linear layers may then be kept in 8 or 4 `bits` (LLM.int8, NF4). [model.lora] is short for it.
    `autocast`: a float32 model's products are in bfloat16 where the processor has those, and all else stays as it is.
    `shards`: while a client of several processes trains, each holds a part of weights, gradients and moments (FSDP).
    """

    path: str = "smollm2-135m-instruct"
    task: Literal["auto", "causal", "classification"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    lora: Lora | None = None
    bits: Literal[8, 4] | None = None
    autocast: bool = False
    shards: bool = False
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
        if self.shards and self.device == "auto":
            raise ConfigError('model.shards: device = "auto" gives each GPU some of the layers already; take "cuda"')
        if self.shards and self.bits is not None:
            raise ConfigError("model.shards: weights in few bits stay whole; leave model.bits out")
        if self.shards and self.view.kind not in SHARDED:
            raise ConfigError(f"model.shards: is of the views {', '.join(SHARDED)}, not of {self.view.kind}")
        return self

    @model_serializer(mode="wrap")
    def _short(self, plain: Any) -> dict[str, Any]:
        found: dict[str, Any] = plain(self)
        for field in ("autocast", "shards"):
            if not found[field]:  # a run without is the one that it was before
                del found[field]
        if isinstance(self.view, Full | Lora):  # as run files have them since before there were views
            found.pop("view", None)
            (found.get("lora") or {}).pop("kind", None)
        for table in (found.get("lora"), found.get("view")):
            if table is not None and not table.get("keep", True):  # a run without is the one that it was before
                del table["keep"]
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

    @model_validator(mode="after")
    def _embeds(self) -> Run:
        if self.data.loss != "contrastive":
            return self
        record = self.privacy is not None and self.privacy.level == "record"
        for name, odd, why in (
            ("model.task", self.model.task != "auto", "it is of an encoder's embeddings"),
            ("model.view", self.model.view.front, "a prompt in front of a text is of models with a head"),
            ("eval.generate", self.eval.generate, "an encoder answers nothing"),
            ("eval.prompts", self.eval.prompts, "an encoder answers nothing"),
            ("privacy.level", record, "a row's loss depends on the others of its batch"),
        ):
            if odd:
                raise ConfigError(f'{name}: does not go with data.loss = "contrastive": {why}')
        return self

    @property
    def task(self) -> Literal["auto", "causal", "classification", "embedding"]:
        """What the model is asked to be."""
        return "embedding" if self.data.loss == "contrastive" else self.model.task

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
