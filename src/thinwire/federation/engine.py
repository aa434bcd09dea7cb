"""What an engine does for the transport: it carries one message to a site and brings one answer. Nothing else is asked.

Imports nothing of ours: an engine's own processes need no more than this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

About = dict[str, str | int | float]  # which piece of which frame: flat, as every engine can carry it


@dataclass(frozen=True)
class Answer:
    """To one message, from a node: a piece of bytes and what it is, or the engine's word for why there is none."""

    node: int
    piece: bytes = b""
    about: About | None = None
    error: str | None = None


class Aborted(RuntimeError):
    """The engine ends its job under the server's loop: another job goes on from the last whole round."""


class Engine(Protocol):
    """Carries opaque bytes and flat tables; a message has one answer, which is asked for by the message's id."""

    def nodes(self, names: Sequence[str], keys: Mapping[str, bytes]) -> dict[int, int]:
        """Client -> node of those of the names that are there now; `keys`: the public key of who may be."""
        ...

    def push(self, node: int, piece: bytes, about: About, seconds: float, round: int) -> str:
        """Send a message that is of no use after so many seconds; its id, empty where the engine does not take it."""
        ...

    def pull(self, id: str) -> Answer | None:
        """The answer if it is here, once; ValueError for what no site of ours sends. Raises Aborted."""
        ...

    def pause(self) -> None:
        """Wait until an answer may be here, for a moment at most."""
        ...


def of(about: About, name: str, kind: type = int) -> int | str | float:
    """A value of a message's table; ValueError where it is missing or of another type."""
    if type(about.get(name)) is not kind:
        raise ValueError(f"a message whose {name!r} is {about.get(name)!r:.40}")
    return about[name]
