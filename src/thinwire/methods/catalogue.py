"""What the methods are, in a file of the package, so that a list or a schema of them does not wait for torch.

`make catalogue` writes the file anew from the classes; a test holds it to them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from thinwire.methods import METHODS

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

FILE = Path(__file__).with_name("catalogue.json")
REF = "#/$defs/{model}"  # how a schema names its parts


def catalogue() -> dict[str, Any]:
    """Name -> `paper`, `about`, `fields` (each with type and default) and `schema` of the method, from the file."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def described() -> dict[str, Any]:
    """The same, from the classes."""
    return {
        name: {
            "paper": cls.paper,
            "about": (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0],
            "fields": {
                field: {"type": _type(info.annotation), "default": _default(info)}
                for field, info in cls.model_fields.items()
                if field != "name"
            },
            "schema": cls.model_json_schema(ref_template=REF),
        }
        for name, cls in sorted(METHODS.items())
    }


def written() -> str:
    """The text of the file, a line a method."""
    lines = (f'"{name}": {json.dumps(about, default=_plain)}' for name, about in described().items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json")


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _type(annotation: Any) -> str:
    """A type as a user reads it: float | None, "adamw" | "sgd"."""
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(json.dumps(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type(inner) for inner in get_args(annotation))
    if get_origin(annotation) is dict:
        return "{{{}: {}}}".format(*map(_type, get_args(annotation)))
    if annotation is NoneType:
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
