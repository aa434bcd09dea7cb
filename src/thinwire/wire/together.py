"""What a client of several processes does with a frame that one of them has received."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from thinwire.wire.frame import Frame

Together = Callable[[Frame], AbstractContextManager[None]]  # while it lasts the other processes work on the frame too


def alone(frame: Frame) -> AbstractContextManager[None]:
    """There are no others."""
    return nullcontext()
