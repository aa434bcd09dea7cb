"""Which folders are those of runs and of sites, and whether a process is at work in one."""

from __future__ import annotations

import os
from pathlib import Path

from thinwire.errors import ConfigError

LOCK = ".lock"


def is_run(folder: Path) -> bool:
    """Whether a run was begun in a folder."""
    return (folder / "run.toml").is_file()


def is_site(folder: Path) -> bool:
    """Whether a client works in a folder, or did."""
    return (folder / "site.json").is_file()


def found(path: Path) -> list[Path]:
    """The folders of runs and sites: the path itself, else those in it, and in its `runs`. ConfigError for none."""
    if not path.is_dir():
        raise ConfigError(f"{path}: not a folder")
    if is_run(path) or is_site(path):
        return [path]
    below = sorted(folder for place in (path, path / "runs") if place.is_dir() for folder in place.iterdir())
    if not (there := [folder for folder in below if is_run(folder) or is_site(folder)]):
        raise ConfigError(f"{path}: neither the folder of a run nor that of a site, and holds none")
    return there


def holder(folder: Path) -> int | None:
    """The process that holds a folder, by its lock, which is looked at and not touched; None where none does."""
    path = folder / LOCK
    try:
        pid, at = int(path.read_text()), path.stat()
    except (OSError, ValueError):
        return None
    try:
        locks = Path("/proc/locks").read_text()
    except OSError:
        return pid if _there(pid) else None
    # by its number alone: of some file systems the kernel lists locks under another device
    held = any(word.endswith(f":{at.st_ino}") for line in locks.splitlines() for word in line.split())
    return pid if held else None


def _there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
