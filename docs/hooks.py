"""What mkdocs does beside its configuration: absent pages are left out, and the run file's tables are made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def on_config(config: Any) -> Any:
    """Leave out of the navigation what is not in the folder."""
    config["nav"] = _present(config["nav"], Path(config["docs_dir"]))
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the tables of the run file's fields where a page asks for them: [[fields of module:Class]]."""
    return re.sub(r"^\[\[fields of ([\w.]+):(\w+)\]\]$", lambda m: _fields(m[1], m[2]), markdown, flags=re.MULTILINE)


def _present(nav: list[Any], docs: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            if inner := _present(target, docs):
                kept.append({title: inner})
        elif (docs / target).exists():
            kept.append(entry)
    return kept


def _fields(module: str, name: str) -> str:
    import importlib
    import inspect

    model = getattr(importlib.import_module(module), name)
    about = inspect.cleandoc(model.__doc__ or "")
    lines = [about, "", "| field | type | default |", "| --- | --- | --- |"]
    for field, info in model.model_fields.items():
        value = "required" if info.is_required() else f"`{_json(info.get_default(call_default_factory=True))}`"
        lines.append(f"| `{field}` | {_type(info.annotation)} | {value} |")
    return "\n".join(lines)


def _json(value: Any) -> str:
    if hasattr(value, "model_dump"):
        return "its own defaults"
    return json.dumps(value, default=lambda other: other.model_dump() if hasattr(other, "model_dump") else str(other))


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(inner) for inner in get_args(annotation)))
    if origin is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is dict:
        return "table of {} to {}".format(*map(_type, get_args(annotation)))
    if annotation is NoneType:
        return "nothing"
    return getattr(annotation, "__name__", str(annotation)).replace("|", "\\|")
