"""The ledger: every byte that crosses, counted as the length of a frame that was really encoded."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import TypeVar

F = TypeVar("F", bound=Sized)


@dataclass
class Ledger:
    """Bytes of one round: client -> bytes, each way. A frame sent twice is counted twice."""

    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)

    def down(self, client: int, frame: F) -> F:
        """Count a frame to a client, and hand it on."""
        self.sent[client] = self.sent.get(client, 0) + len(frame)
        return frame

    def up(self, client: int, frame: F) -> F:
        """Count a frame from a client, and hand it on."""
        self.received[client] = self.received.get(client, 0) + len(frame)
        return frame

    @property
    def bytes_down(self) -> int:
        return sum(self.sent.values())

    @property
    def bytes_up(self) -> int:
        return sum(self.received.values())
