"""Peak memory of this process, in bytes, without what the imports took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path


def resident() -> int:
    """Bytes resident now."""
    return _status("VmRSS:") or _getrusage()


def peak() -> int:
    """The most bytes resident since the last `reset` (since the start where the system cannot reset)."""
    return _status("VmHWM:") or _getrusage()


def reset() -> None:
    """Begin a new peak, where the system allows it."""
    # Not Linux, or not allowed: the peak is then that of the whole process, never less than the true one.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def for_good() -> Iterator[None]:
    """What is made within stays to the end: the collector of cycles, which would walk it again and again, rests."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


def trim() -> None:
    """Hand back to the system what has been freed, where its allocator keeps that for later (glibc's does)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def _getrusage() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
