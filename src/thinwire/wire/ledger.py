"""The ledger: every byte that crosses, counted as the length of a frame that was really encoded."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F", bound=Sized)


@dataclass
class Ledger:
    """Bytes of one round: client -> bytes, each way. A frame sent twice is counted twice.

    With a `digest` of frames, `digests` has that of each client's last reply. `keys`: those of key material,
    both ways together, apart from the others.
    """

    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)
    digest: Callable[[Any], str] | None = None
    digests: dict[int, str] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)

    def down(self, client: int, frame: F) -> F:
        """Count a frame to a client, and hand it on."""
        self.sent[client] = self.sent.get(client, 0) + len(frame)
        return frame

    def up(self, client: int, frame: F) -> F:
        """Count a frame from a client, and hand it on."""
        self.received[client] = self.received.get(client, 0) + len(frame)
        if self.digest is not None:
            self.digests[client] = self.digest(frame)
        return frame

    def key(self, client: int, frame: F) -> F:
        """Count a frame of key material, and hand it on."""
        self.keys[client] = self.keys.get(client, 0) + len(frame)
        return frame

    @property
    def bytes_down(self) -> int:
        return sum(self.sent.values())

    @property
    def bytes_keys(self) -> int:
        return sum(self.keys.values())

    @property
    def bytes_up(self) -> int:
        return sum(self.received.values())
