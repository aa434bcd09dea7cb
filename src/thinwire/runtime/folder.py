"""A run's folder: it belongs to one process at a time, and holds a run that has ended or one that can go on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thinwire.errors import ConfigError

FILE = ".lock"
LOGFILE = "log.txt"
LOG = logging.getLogger("thinwire")


def ended(folder: Path) -> bool:
    """Whether the folder's run has ended: its summary is there and whole. A damaged one is written anew on resuming."""
    try:
        return isinstance(json.loads((folder / "summary.json").read_bytes()), dict)
    except (FileNotFoundError, ValueError):
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if it is not there; ConfigError where another process does.

    The lock is the kernel's: it ends with the process, however that ends, and children do not have it. A folder that
    was made for it, and in which nothing else came to be, goes with it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _held(folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            (folder / FILE).unlink()
            for place in made:  # up to the first that is not empty
                place.rmdir()
        os.close(descriptor)


def _held(folder: Path) -> int:
    """The lock's file, open and locked."""
    while True:
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # else its holder has removed it since it was opened
                return descriptor
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(f"{folder}: another process (pid {pid or 'unknown'}) is at work here") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """What went wrong on the way, with its traceback, goes to log.txt of the run's folder."""
    handler = logging.FileHandler(folder / LOGFILE, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    passed_on, LOG.propagate = LOG.propagate, False
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.propagate = passed_on
        handler.close()


def clear(folder: Path) -> None:
    """Make the empty folder for large frames; what a process that was killed has left half-written goes."""
    spool = folder / "spool"
    left = [spool, *folder.glob(".model.*.tmp"), *folder.glob(".model.*.old"), *(folder / "state").glob("*.part")]
    for place in left:
        shutil.rmtree(place, ignore_errors=True)
    for pattern in (".tmp*", "*.part", "*.tmp"):
        for file in (folder / "state").rglob(pattern):
            file.unlink(missing_ok=True)
    spool.mkdir(parents=True)
