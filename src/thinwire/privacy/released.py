"""What leaves a client where a run is private: each field of a reply, and in what state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

Released = Mapping[str, Literal["noised", "absent", "public"]]


def check_released(reply: Any, released: Released | None) -> None:
    """RuntimeError where a field of the reply would leave that is not spoken for, or one that is to be absent is not.

    `released`: what the method has made of each field, None where it knows nothing of privacy. Fields that are not
    marked for release are asked about too: whatever a reply has travels.
    """
    for field in dataclasses.fields(reply):
        name, state = f"{type(reply).__name__}.{field.name}", (released or {}).get(field.name)
        if state not in ("noised", "absent", "public"):
            raise RuntimeError(f"{name} would leave a private run, and its method names no state of it")
        if state == "absent" and not _empty(getattr(reply, field.name)):
            raise RuntimeError(f"{name} is to be absent in a private run, and it is not")


def _empty(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 0
    return value is None or (isinstance(value, str | bytes | list | Mapping) and not value)
