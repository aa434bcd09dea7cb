"""A run is a file: TOML, checked whole before anything runs, overridden by key=value and by nothing else."""

from __future__ import annotations

import difflib
import importlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from thinwire.core import Method
from thinwire.methods import METHODS
from thinwire.runtime.cohort import All, Cohort


class ConfigError(ValueError):
    """The run file is wrong; the message is one line that names the field."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Model(_Section):
    """The start model. `path`: a Hugging Face folder, a hub name, a .gguf file, smollm2-135m-instruct (from a package)."""

    path: str = "smollm2-135m-instruct"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Data(_Section):
    """The clients' rows, and how they are shown to the model.

    `path`: a folder (one .jsonl a client), one .jsonl file to be partitioned, or the name of a packaged set.
    `partition`: files, iid, dirichlet (skew of `column`) or column (a client a value of `column`). `template` names a prompt
    template; `prompt` and `answer` are format strings over the columns, instead of it. With `choices` the answers are a
    closed set, scored against each other; `loss = "answer"` trains on the answer's tokens all the same.
    """

    path: str
    partition: Literal["files", "iid", "dirichlet", "column"] = "iid"
    column: str = "output"
    clients: PositiveInt = 8
    alpha: PositiveFloat = 1.0
    minimum: PositiveInt = 1  # rows that each client gets at least, under dirichlet
    rows: PositiveInt | None = None  # use that many rows at most (all clients together), drawn at random
    heldout: float | int | str = 0.1  # a share or a number of the rows, or a .jsonl file
    heldout_tasks: str | None = None  # a .jsonl file of tasks that no client holds
    template: Literal["plain", "alpaca", "chat", "completion"] = "plain"
    prompt: str | None = None
    answer: str | None = None
    choices: tuple[str, ...] | None = None
    loss: Literal["choice", "answer"] = "choice"
    max_length: PositiveInt = 512
    shuffle_answers: bool = False  # a control: what is learnt then is only format

    @model_validator(mode="after")
    def _pairs(self) -> Data:
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer go together")
        if self.choices is not None and len(set(self.choices)) < 2:
            raise ValueError("choices needs at least two different answers")
        return self


class Eval(_Section):
    """Scoring of held-out rows: `every` so many rounds (0: before and after only), at most `rows` a split."""

    every: NonNegativeInt = 0
    rows: PositiveInt = 256
    batch_size: PositiveInt = 16
    generate: NonNegativeInt = 0  # rows a split that are generated for Rouge-L
    max_new_tokens: PositiveInt = 64


class Run(_Section):
    """A whole run. `threads`: of torch and of the kernels; None leaves torch's choice."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegativeInt = 0
    rounds: PositiveInt = 10
    threads: PositiveInt | None = None
    model: Model = Model()
    data: Data
    method: SerializeAsAny[Method]
    cohort: tuple[Cohort, ...] = (All(),)
    eval: Eval = Eval()
    environment: Mapping[str, str] = {}  # written by a run for the reader; never read back

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        return method_of(value) if isinstance(value, dict) else value

    @field_validator("cohort", mode="before")
    @classmethod
    def _segments(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _ends(self) -> Run:
        if not self.cohort or any(segment.rounds is None for segment in self.cohort[:-1]):
            raise ValueError("cohort: every segment but the last needs `rounds`")
        return self

    def first_difference(self, other: Run) -> str | None:
        """The first field in which another run differs, None if a checkpoint of the one serves the other."""
        aside = {"environment", "threads"}
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
        name = fields.get("name")
        if not isinstance(name, str) or name not in METHODS:
            raise ConfigError(f"method.name: {name!r} is not a method; known: {', '.join(sorted(METHODS))}")
        cls: Any = METHODS[name]
    else:
        cls = _import(path)
    try:
        method: Method = cls.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_explain(error, ("method",), cls)) from None
    return method


def load(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run in a TOML file under `key=value` overrides; raises ConfigError with one line."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for change in overrides:
        override(tree, change)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], source: str = "the run file") -> Run:
    """The run that a tree of plain values means; raises ConfigError with one line."""
    try:
        return Run.model_validate(tree)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, (), Run)}") from None


def override(tree: dict[str, Any], change: str) -> None:
    """Set one `key=value` in a tree of plain values; raises ConfigError."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{change!r} is not key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
    if key == "method.name" and tree.get("method", {}).get("name") != value:
        tree["method"] = {}  # the fields of another method would not fit
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {parent} is not a table")
    tree[last] = value


def _explain(error: ValidationError, prefix: tuple[str, ...], root: type[BaseModel]) -> str:
    first = error.errors()[0]
    if isinstance(inner := first.get("ctx", {}).get("error"), ConfigError):
        return str(inner)
    place = [part for part in first["loc"] if part not in ("all", "uniform", "cyclic")]
    where = ".".join(str(part) for part in (*prefix, *place))
    if first["type"] == "extra_forbidden":
        known = sorted(_fields(root, place[:-1]))
        close = difflib.get_close_matches(str(place[-1]), known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{where}: unknown field{hint}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where}: missing"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{where}.kind: must be one of {first['ctx'].get('expected_tags', 'all, uniform, cyclic')}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {first['input']!r:.60}" if where else message


def _fields(root: type[BaseModel], place: Sequence[str | int]) -> Iterator[str]:
    for part in place:
        if isinstance(part, int) or part not in root.model_fields:
            return
        annotation = root.model_fields[part].annotation
        if not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
            return
        root = annotation
    yield from root.model_fields


def _import(path: Any) -> type[Method]:
    module, colon, name = str(path).partition(":")
    if not colon:
        raise ConfigError(f"method.path: {path!r} is not of the form package.module:Class")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method.path: {error}") from None
    if not isinstance(found, type) or not issubclass(found, Method):
        raise ConfigError(f"method.path: {path} is not a thinwire.core.Method")
    return found


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
