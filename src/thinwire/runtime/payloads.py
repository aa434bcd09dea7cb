"""What passes between a server and its clients beside a method's own payloads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from thinwire.wire.payload import LATE


def release() -> Any:
    """A field that derives from a client's data."""
    return field(metadata={"release": True})


@dataclass(frozen=True)
class Hello:
    """A client is asked whether it can take part; what a site compares stands beside every frame."""


@dataclass(frozen=True)
class Ready:
    """It can."""


@dataclass(frozen=True)
class Scores:
    """How the weights score on a client's rows; `heldout`: whether it trains on none of them.

    `mean_only`: true where they may be kept as a part of a mean of several clients alone.
    """

    examples: int = release()
    loss: float = release()
    accuracy: float | None = release()
    rouge_l: float | None = release()
    heldout: bool = release()
    mean_only: bool | None = field(default=None, metadata=LATE)
