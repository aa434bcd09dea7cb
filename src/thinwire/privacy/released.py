"""What leaves a client where a run is private: each field of a reply, and in what state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from thinwire.privacy.protection import Level

State = Literal["noised", "absent", "public", "trusted"]
Released = Mapping[str, State]
"""trusted: it leaves as it is, and the server, whom all trust with it, adds the noise before anybody sees it."""

REPORTS: Released = {"examples": "public", "loss": "absent", "skipped": "absent", "probes": "absent"}
BLANK = {"examples": 1, "loss": math.nan, "skipped": 0, "probes": None}


def of_update(level: Level, payload: type) -> Released:
    """Of a reply all but what it reports is its update: noised by the client, or trusted to the server."""
    state: State = "noised" if level == "record" else "trusted"
    return {field.name: REPORTS.get(field.name, state) for field in dataclasses.fields(payload)}


def in_words(promised: Mapping[str, Any]) -> str:
    """What a run's summary says of its privacy, as a sentence."""
    unit = "a row of a client's" if promised["level"] == "record" else "a client"
    seen = "all see, the server too," if promised.get("server") else "all see"
    noise = " to ".join(f"{end:.4g}" for end in sorted({promised["noise"][0], promised["noise"][-1]}))
    return (
        f"differential privacy: whether {unit} was there changes what {seen} by epsilon {promised['epsilon']:.4g} "
        f"at delta {promised['delta']:g} at most (clip {promised['clip']:g}, noise {noise})"
    )


def check_released(reply: Any, released: Released | None) -> None:
    """RuntimeError where a field of the reply would leave that is not spoken for, or one that is to be absent is not.

    `released`: what the method has made of each field, None where it knows nothing of privacy. Fields that are not
    marked for release are asked about too: whatever a reply has travels.
    """
    for field in dataclasses.fields(reply):
        name, state = f"{type(reply).__name__}.{field.name}", (released or {}).get(field.name)
        if state not in ("noised", "absent", "public", "trusted"):
            raise RuntimeError(f"{name} would leave a private run, and its method names no state of it")
        if state == "absent" and not _empty(getattr(reply, field.name)):
            raise RuntimeError(f"{name} is to be absent in a private run, and it is not")


def withheld(reply: Any, released: Released) -> Any:
    """The reply without what it reports beside its update: no loss, nothing of skipped steps, one example.

    All clients then count alike. Of a reply those fields that are not "absent" or "public" stay as they are.
    """
    names = [name for name, state in released.items() if REPORTS.get(name) == state]
    return dataclasses.replace(reply, **{name: BLANK[name] for name in names}) if names else reply


def _empty(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 0
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value == 0 or (isinstance(value, str | bytes | list | Mapping) and not value)
