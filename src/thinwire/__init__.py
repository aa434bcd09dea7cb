"""thinwire: fine-tune every parameter of a language model across clients, over kilobytes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from thinwire import methods, moved

__version__ = "0.1.0"

# what a notebook imports from here; each comes with torch, so none is loaded before it is asked for
_PLACES = {
    "federate": "thinwire.api",
    "Result": "thinwire.api",
    "All": "thinwire.runtime.cohort",
    "Cyclic": "thinwire.runtime.cohort",
    "Only": "thinwire.runtime.cohort",
    "Uniform": "thinwire.runtime.cohort",
    **{name: module for module, _, name in (place.partition(":") for place in methods.PLACES.values())},
}


moved.install()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
