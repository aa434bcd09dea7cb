"""Checkpoints: the state as a frame, and what the loop needs beside it, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from thinwire import wire
from thinwire.runtime.store import flush
from thinwire.wire import LazyTensors, Spooled

KEPT = 2


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a round."""

    round: int
    held: dict[str, str]  # client -> version
    bytes_down: int
    bytes_up: int
    seconds: float
    peak_memory_bytes: int
    finished: bool = False


def write(folder: Path, state: Any, progress: Progress) -> None:
    """Write the checkpoint of a round: to a temporary name, flushed, renamed; then drop all but the last two."""
    final = _place(folder, progress.round)
    partial = folder / (final.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    frame = wire.encode(state, round=progress.round, spool=partial)
    target = partial / "state.frame"
    if isinstance(frame, Spooled):
        frame.path.rename(target)
    else:
        target.write_bytes(frame)
    (partial / "progress.json").write_text(json.dumps(asdict(progress)))
    for path in (target, partial / "progress.json", partial):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    flush(folder)
    for old in rounds(folder)[:-KEPT]:
        shutil.rmtree(_place(folder, old))


def rounds(folder: Path) -> list[int]:
    """The rounds that have a checkpoint, ascending."""
    names = [path.name.removeprefix("round-") for path in folder.glob("round-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def read(folder: Path, state: type) -> tuple[Any, Progress] | None:
    """The newest checkpoint that is whole, None if there is none; a damaged one is passed over for the one before."""
    for round in reversed(rounds(folder)):
        try:
            progress = Progress(**json.loads((_place(folder, round) / "progress.json").read_text()))
            return _in_memory(on_disk(folder, round, state)), progress
        except (OSError, ValueError, TypeError, wire.WireError):
            continue
    return None


def on_disk(folder: Path, round: int, state: type) -> Any:
    """The state of a round's checkpoint, whose named tensors are read when asked for; until KEPT more were written.

    Raises OSError or WireError for a checkpoint that is absent or damaged.
    """
    path = _place(folder, round) / "state.frame"
    return wire.decode(state, Spooled(path, path.stat().st_size))


def _place(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}"


def _in_memory(state: Any) -> Any:
    """The state without ties to its file, which a later checkpoint removes."""
    lazy = {f.name: getattr(state, f.name) for f in fields(state) if isinstance(getattr(state, f.name), LazyTensors)}
    return replace(state, **{name: dict(tensors) for name, tensors in lazy.items()})
