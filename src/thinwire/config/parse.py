"""From a TOML file, overridden by key=value and by nothing else, to a run that is checked whole."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thinwire.config.explain import explain, leaves
from thinwire.config.method import as_json
from thinwire.config.schema import Run
from thinwire.errors import ConfigError


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
    for key, value in leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{source}: {key}: must be a finite number, got {value}")
    segments = {"cohort": [tree["cohort"]]} if isinstance(tree.get("cohort"), dict) else {}
    try:
        # As JSON, whose types are TOML's: strict then means that no "5" or true passes for a number.
        return Run.model_validate_json(as_json(tree | segments), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, (), Run, tree)}") from None


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
