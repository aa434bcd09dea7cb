"""The method that a table of a run file means: one of ours by its name, or the user's own by its path."""

from __future__ import annotations

import importlib
import json
import operator
import os
import sys
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from thinwire.config.explain import explain, nearest
from thinwire.errors import ConfigError
from thinwire.methods import METHODS

if TYPE_CHECKING:
    from thinwire.core import Method


def method_of(fields: dict[str, Any]) -> Method:
    """The method that a [method] table means: `name` of ours, or `path = "package.module:Class"` of the user's."""
    fields = dict(fields)
    path = fields.pop("path", None)
    if path is None:
        name, known = fields.get("name"), sorted(METHODS)
        if name is None:
            raise ConfigError(f"method.name: missing; known: {', '.join(known)}")
        if name not in known:
            hint = nearest(str(name), known)
            raise ConfigError(f"method.name: {name!r} is not a method{hint}; known: {', '.join(known)}")
        cls: Any = METHODS[name]
    else:
        cls = _import(path)
    try:
        method: Method = cls.model_validate_json(as_json(fields), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, ("method",), cls, fields)) from None
    return method


def method_name(method: Method) -> str:
    """What a method is called, also one of the user's that has no field `name`."""
    return str(getattr(method, "name", type(method).__name__))


def as_json(tree: Any) -> str:
    """A tree of plain values as JSON, whose types are TOML's."""
    return json.dumps(tree, default=str)  # a date, for one, is its text


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
    from thinwire.core import Method

    if not isinstance(found, type) or not issubclass(found, Method):
        raise ConfigError(f"method.path: {path} is not a thinwire.core.Method")
    for part in ("Down", "Up", "State"):
        if not hasattr(found, part):
            raise ConfigError(f"method.path: {path} has no {part}")
    return found
