"""What a validation found wrong, in one line that names the field as the user wrote it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from thinwire.errors import ConfigError


def explain(error: ValidationError, prefix: tuple[str, ...], root: type[BaseModel], tree: Any) -> str:
    """The first error in a tree of plain values that was to be `root`; `prefix`: where in the file the tree stands."""
    errors = error.errors()
    first = errors[0]
    if isinstance(inner := first.get("ctx", {}).get("error"), ConfigError):
        return str(inner)
    place = _place(first["loc"], first["type"] == "missing", tree)
    where = ".".join(str(part) for part in (*prefix, *place))
    if first["type"] == "extra_forbidden":
        known = sorted(_fields(root, first["loc"][:-1]))
        return f"{where}: unknown field{nearest(str(place[-1]), known)}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where}: missing"
    if first["type"] == "union_tag_not_found":
        known = [str(model.model_fields["kind"].default) for model in _at(root, first["loc"])]
        return f"{where}.kind: missing; known: {', '.join(known)}"
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


def _fields(root: type[BaseModel], loc: Sequence[str | int]) -> set[str]:
    """The fields of the models that pydantic's place `loc` can mean."""
    return {name for model in _at(root, loc) for name in model.model_fields}


def _at(root: type[BaseModel], loc: Sequence[str | int]) -> list[type[BaseModel]]:
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


def nearest(word: str, known: Sequence[str]) -> str:
    """What the user may have meant, with a space before it; "" where nothing is near."""
    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each plain value of a tree, with its name: keys and indices with dots between them."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
