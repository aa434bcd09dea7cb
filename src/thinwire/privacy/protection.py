"""What of a run is protected, and how: the bound of one unit's part, and the noise over it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["record", "client"]
BOTH: tuple[Level, ...] = ("record", "client")


class Protection(NamedTuple):
    """`clip` bounds the length of one unit's part in a sum, `noise` times that is the deviation of the noise on it.

    level: the unit is a `record` of a client, whose noise the client itself adds; or a whole `client`, the noise on the
    sum of all being the server's.
    """

    level: Level
    clip: float
    noise: float

    @property
    def deviation(self) -> float:
        """Of the noise, in what is summed."""
        return self.noise * self.clip

    def unit(self, fine: int) -> float:
        """Of the integers that travel, so many in a deviation of the noise."""
        return self.deviation / fine
