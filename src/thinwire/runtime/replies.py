"""The replies of a run's last round, as they counted, kept in its folder: for what each of them was worth."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinwire import wire
from thinwire.wire import Frame


class Replies:
    """A folder of frames: round-NNNNNN/CLIENT.frame. A round begins with none, and the one before it then goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, round: int) -> None:
        """Drop all but the round before, whose state a run may have to go on from."""
        for place in self.folder.glob("round-*"):
            if place != self._place(round - 1):
                shutil.rmtree(place)
        self._place(round).mkdir(parents=True)

    def keep(self, round: int, client: int, up: Any) -> None:
        """Write a reply of the round."""
        frame = wire.encode(up, round=round, client=client, spool=self._place(round))
        frame.move_to(self._place(round) / f"{client}.frame")

    def clients(self, round: int) -> tuple[int, ...]:
        """Whose replies there are of a round, in order of their numbers."""
        return tuple(sorted(int(path.stem) for path in self._place(round).glob("*.frame") if path.stem.isdecimal()))

    def of(self, round: int, kind: type, clients: tuple[int, ...]) -> Iterator[tuple[int, Any]]:
        """The replies of some of them, one after another, whose large tensors are read when asked for."""
        for client in clients:
            yield client, wire.decode(kind, Frame.load(self._place(round) / f"{client}.frame"))

    def _place(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}"
