"""A run is a file: TOML, checked whole before anything runs, overridden by key=value and by nothing else."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import operator
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializationInfo,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from thinwire.core import Method
from thinwire.errors import ConfigError as ConfigError
from thinwire.methods import METHODS
from thinwire.model.views import AnyView
from thinwire.model.views import Full as Full
from thinwire.model.views import Lora as Lora
from thinwire.runtime.cohort import All, Cohort


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Model(_Section):
    """The start model. `path`: a Hugging Face folder, a hub name, a .gguf file, or what packages carry:
    smollm2-135m-instruct, minilm.

    `task`: causal (goes on with a text) or classification (names a text's class; an encoder gets a fresh head), found
    from the model where it is auto. `device`: as torch calls it, such as cpu or cuda:0; or auto, for a model that spans
    all GPUs of the machine. `view`: what all methods train, the model or, where its kind is lora, factors beside it and
    a classifier's head; linear layers may then be kept in 8 or 4 `bits` (LLM.int8, NF4). [model.lora] is short for it.
    """

    path: str = "smollm2-135m-instruct"
    task: Literal["auto", "causal", "classification"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    lora: Lora | None = None
    bits: Literal[8, 4] | None = None
    view: AnyView = Full()

    @model_validator(mode="after")
    def _adapted(self) -> Model:
        if {"lora", "view"} <= self.model_fields_set and self.lora != self.view:
            raise ConfigError('model.lora: is short for [model.view] with kind = "lora"; one of them is enough')
        view = self.view if self.lora is None else self.lora
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "lora", view if isinstance(view, Lora) else None)
        if self.bits is not None and self.lora is None:
            raise ValueError("bits needs [model.lora]: quantised weights cannot be trained themselves")
        return self

    @model_serializer(mode="wrap")
    def _short(self, plain: Any) -> dict[str, Any]:
        found: dict[str, Any] = plain(self)
        if isinstance(self.view, Full | Lora):  # as run files have them since before there were views
            found.pop("view", None)
            (found.get("lora") or {}).pop("kind", None)
        return found


class Data(_Section):
    """The clients' rows, and how they are shown to the model.

    A source is a .jsonl, .csv, .tsv or .parquet file, a packaged set, or a Hugging Face data set: a folder that
    save_to_disk wrote, or a name such as nyu-mll/glue:sst2@validation (subset and split may be left out). `path`: a
    source to be partitioned, or a folder of files, one a client. `partition`: files, iid, size (sizes follow
    Dirichlet(alpha)), dirichlet (skew of `column`), column (a client a value of `column`, all or those in `values`) or
    task (the values of `column` dealt whole to `clients`). `template` names a prompt template; `prompt` and `answer`
    are format strings over the columns instead of it, with `template = "jinja"` Jinja templates. With `choices` the
    answers are a closed set, scored against each other; `loss = "answer"` trains on the answer's tokens all the same.
    For a classifier the prompt is the text, by default the column `input`, the answer its class, and `choices` the
    classes, found in the clients' rows where it is None. `words` replaces the values of the answer's column, such
    as labels by the words that stand for them. `balanced`: a client's batches hold the answers of a closed set in
    equal numbers, however skewed its rows are. `pack`: short examples share a row of up to max_length tokens, and
    do not see each other; batch_size then counts such rows.
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
    template: Literal["plain", "alpaca", "chat", "completion", "jinja"] = "plain"
    prompt: str | None = None
    answer: str | None = None
    choices: tuple[str, ...] | None = None
    loss: Literal["choice", "answer"] = "choice"
    words: dict[str, str] | None = None
    balanced: bool = False
    max_length: int = Field(default=512, ge=2)  # prompt and answer have a token each at least
    too_long: Literal["answer", "cut", "drop"] = "answer"  # of rows beyond max_length cut the answer, or prompts too
    pack: bool = False
    shuffle_answers: bool = False  # a control: what is learnt then is only format
    pooled: bool = False  # a reference: all the clients' rows with one client
    public: str | None = None  # a source whose rows the server holds, for checks and calibration
    validation: float = Field(default=0.0, ge=0, lt=1)  # score on this share of the clients' rows, not on held-out ones

    @field_validator("heldout")
    @classmethod
    def _heldout(cls, value: float | int | str) -> float | int | str:
        if not isinstance(value, str) and (value < 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError(f"{value} is neither a share below 1, a number of rows nor a source")
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
        if self.values is not None and self.partition != "column":
            raise ConfigError('data.values: goes with data.partition = "column" only')
        return self


class Eval(_Section):
    """Scoring of held-out rows: `every` so many rounds (0: before and after only), at most `rows` a split.

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


class Track(_Section):
    """Experiment trackers that are told the run's numbers, each on this machine: extras of their names."""

    to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    project: str = "thinwire"


class Federation(_Section):
    """A run on other machines: `sites`, by name, are its clients, in this order; each holds its own rows.

    A reply that takes longer than `deadline` seconds counts as absent for the round; a round with fewer replies than
    `quorum` ends the run, which can go on later. A site that is not connected is waited for at most `patience` seconds.
    Frames beyond `chunk_bytes` travel in pieces. With `evaluate` each site scores the weights on its held-out rows too.
    `max_examples`: that a site may claim, and so count in a mean, where it was not registered with a number of its own.
    """

    sites: tuple[str, ...] = ()
    deadline: PositiveFloat = 3600.0
    quorum: PositiveInt = 1
    patience: NonNegativeFloat = 120.0
    chunk_bytes: int = Field(3 << 24, ge=1 << 10, le=1 << 30)
    evaluate: bool = False
    max_examples: PositiveInt | None = None

    @field_validator("sites")
    @classmethod
    def _sites(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
                raise ValueError(f"{name!r} is not a name: letters, digits, dots, dashes; 64 at most")
        if len(set(value)) < len(value):
            raise ValueError("a name is there twice")
        return value


class Run(_Section):
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
    environment: Mapping[str, str] = {}  # written by a run: for the reader, and to see that it goes on with the same

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        if not isinstance(value, dict | Method):
            raise ValueError(f'must be a table, such as {{ name = "fedkseed" }}, got {value!r:.60}')
        return method_of(value) if isinstance(value, dict) else value

    @field_serializer("method")
    def _method_table(self, method: Method, info: SerializationInfo) -> dict[str, Any]:
        cls = type(method)
        path = {} if cls in METHODS.values() else {"path": f"{cls.__module__}:{cls.__qualname__}"}
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
            "federation": Federation.model_fields.keys() - {"sites"},
        }
        mine, theirs = (dict(_leaves(r.model_dump(exclude=aside))) for r in (self, other))
        for key in dict.fromkeys([*mine, *theirs]):
            if mine.get(key) != theirs.get(key):
                return f"{key} is {theirs.get(key)!r} there, {mine.get(key)!r} here"
        return None

    def to_toml(self) -> str:
        """The file of this run with every default filled in."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def method_of(fields: dict[str, Any]) -> Method:
    """The method that a [method] table means: `name` of ours, or `path = "package.module:Class"` of the user's."""
    fields = dict(fields)
    path = fields.pop("path", None)
    if path is None:
        name, known = fields.get("name"), sorted(METHODS)
        if name is None:
            raise ConfigError(f"method.name: missing; known: {', '.join(known)}")
        if name not in known:
            hint = _nearest(str(name), known)
            raise ConfigError(f"method.name: {name!r} is not a method{hint}; known: {', '.join(known)}")
        cls: Any = METHODS[name]
    else:
        cls = _import(path)
    try:
        method: Method = cls.model_validate_json(_json(fields), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, ("method",), cls, fields)) from None
    return method


def method_name(method: Method) -> str:
    """What a method is called, also one of the user's that has no field `name`."""
    return str(getattr(method, "name", type(method).__name__))


def load(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run in a TOML file under `key=value` overrides; raises ConfigError with one line."""
    tree = read(path, overrides)
    tree.pop("compare", None)  # that table is for thinwire compare
    return parse(tree, str(path))


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tree of plain values in a TOML file under `key=value` overrides; raises ConfigError with one line."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8 or TOML, dates that do not exist
        raise ConfigError(f"{path}: not TOML: {error}") from None
    override(tree, overrides)
    return tree


def parse(tree: dict[str, Any], source: str = "the run file") -> Run:
    """The run that a tree of plain values means; raises ConfigError with one line."""
    for key, value in _leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{source}: {key}: must be a finite number, got {value}")
    segments = {"cohort": [tree["cohort"]]} if isinstance(tree.get("cohort"), dict) else {}
    try:
        # As JSON, whose types are TOML's: strict then means that no "5" or true passes for a number.
        return Run.model_validate_json(_json(tree | segments), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, (), Run, tree)}") from None


def override(tree: dict[str, Any], changes: Sequence[str]) -> None:
    """Set each `key=value` in a tree of plain values; raises ConfigError.

    Another method.name or method.path first drops the fields of the old method, wherever it stands among the changes.
    """
    parsed = [_parse(change) for change in changes]
    for keys, value in sorted(parsed, key=lambda change: change[0] not in _CHOOSE):
        at: Any = tree
        if keys in _CHOOSE and isinstance(old := tree.get("method"), dict) and old.get(keys[-1]) != value:
            tree["method"] = {}
        for i, parent in enumerate(keys[:-1]):
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{'.'.join(keys)}: {'.'.join(keys[: i + 1])} is not a table")
        at[keys[-1]] = value


_CHOOSE = (["method", "name"], ["method", "path"])


def _parse(change: str) -> tuple[list[str], Any]:
    key, equals, text = change.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"{change!r} is not key=value")
    try:
        return keys, tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return keys, text  # a bare word is a string


def _explain(error: ValidationError, prefix: tuple[str, ...], root: type[BaseModel], tree: Any) -> str:
    errors = error.errors()
    first = errors[0]
    if isinstance(inner := first.get("ctx", {}).get("error"), ConfigError):
        return str(inner)
    place = _place(first["loc"], first["type"] == "missing", tree)
    where = ".".join(str(part) for part in (*prefix, *place))
    if first["type"] == "extra_forbidden":
        known = sorted({name for model in _meant(root, first["loc"][:-1]) for name in model.model_fields})
        return f"{where}: unknown field{_nearest(str(place[-1]), known)}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where}: missing"
    if first["type"] == "union_tag_not_found":
        kinds = [model.model_fields["kind"].default for model in _meant(root, first["loc"])]
        return f"{where}.kind: missing; known: {', '.join(kinds)}"
    if first["type"] == "union_tag_invalid":
        return f"{where}.kind: {first['ctx']['tag']!r} is not one of {first['ctx']['expected_tags']}"
    if first["type"] == "value_error":
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    # A field of several types has an error for each.
    wanted = [e["msg"] for e in errors if _place(e["loc"], False, tree) == place]
    message = " or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in wanted))
    must = "must be " if first["msg"].startswith("Input should be ") else ""
    return f"{where}: {must}{message}, got {first['input']!r:.60}"


def _place(loc: Sequence[Any], missing: bool, tree: Any) -> list[Any]:
    """Where in the user's tree an error is; pydantic's place also names the members of unions."""
    place: list[Any] = []
    for part in loc:
        inside = part in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(part, int)
        if inside:
            place.append(part)
            tree = tree[part]
    return [*place, loc[-1]] if missing else place


def _meant(root: type[BaseModel], loc: Sequence[str | int]) -> list[type[BaseModel]]:
    """The models that pydantic's place `loc` can mean."""
    models = [root]
    for part in loc:
        inner = [m for model in models if part in model.model_fields for m in _models(model.model_fields[str(part)])]
        tagged = [model for model in models if part in (field.default for field in model.model_fields.values())]
        models = inner or (tagged if isinstance(part, str) else []) or models
    return models


def _models(annotation: Any) -> list[type[BaseModel]]:
    annotation = getattr(annotation, "annotation", annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _import(path: Any) -> type[Method]:
    module, colon, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not (module and colon and name):
        raise ConfigError(f"method.path: {path!r} is not of the form package.module:Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` would: the class may stand beside the run file
    try:
        found = operator.attrgetter(name)(importlib.import_module(module))
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"method.path: cannot import {path}: {type(error).__name__}: {error}") from None
    if not isinstance(found, type) or not issubclass(found, Method):
        raise ConfigError(f"method.path: {path} is not a thinwire.core.Method")
    for part in ("Down", "Up", "State"):
        if not hasattr(found, part):
            raise ConfigError(f"method.path: {path} has no {part}")
    return found


def _json(tree: Any) -> str:
    return json.dumps(tree, default=str)  # a date, for one, is its text


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
