"""A frame on its way into a site, in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thinwire.federation.asked import Refused

GAPS = 16  # between the pieces of a frame that are here: they come in order, or nearly so


@dataclass
class Incoming:
    """Pieces of a frame that are here: as ranges, sorted, that do not touch."""

    transfer: str
    total: int
    got: list[tuple[int, int]] = field(default_factory=list)
    small: bytes = b""
    path: Path | None = None

    def add(self, start: int, end: int) -> None:
        """Take note of a piece; Refused for one that overlaps another, or a frame in crumbs."""
        if not 0 <= start < end <= self.total or any(start < e and s < end for s, e in self.got):
            raise Refused("pieces of a frame that do not fit together")
        ranges = sorted([*self.got, (start, end)])
        self.got = ranges[:1]
        for s, e in ranges[1:]:
            if s == self.got[-1][1]:
                self.got[-1] = (self.got[-1][0], e)
            else:
                self.got.append((s, e))
        if len(self.got) > GAPS:
            raise Refused("pieces of a frame that do not fit together")

    @property
    def whole(self) -> bool:
        return self.got == [(0, self.total)]
