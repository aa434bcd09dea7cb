"""Checkpoints: the state as a frame, and what the loop needs beside it, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from thinwire import records, wire
from thinwire.errors import Damaged, first_wrong
from thinwire.files import flush
from thinwire.wire import Frame, LazyTensors

KEPT = 2
Id = Annotated[str, Field(pattern="^[0-9]{1,18}$")]  # of a client


# what a file that is not as it was written costs; a disk that does not answer is another matter
DAMAGE = (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError, wire.WireError, Damaged)


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a round.

    `held`: client -> version. `memory`: client -> the round of its newest file of memory; `evals`: lines of
    evals.jsonl; `versions`: those that the store keeps; None in the checkpoints of a version that did not write them.
    `best`: the round of the best loss, `waited`: the evaluations since, where the run goes by them; `why` it has ended
    before its last round. `bytes_keys`: of key material, beside the others.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    round: int
    held: dict[Id, str]
    bytes_down: int
    bytes_up: int
    seconds: float
    peak_memory_bytes: int
    finished: bool = False
    memory: dict[Id, int] | None = None
    evals: int | None = None
    versions: list[str] | None = None
    best: int | None = None
    best_loss: float | None = None
    waited: int = 0
    why: str | None = None
    bytes_keys: int = 0


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole; `passed`: newer ones that are not, each with the reason."""

    state: Any
    progress: Progress
    passed: tuple[str, ...]


def write(folder: Path, state: Any, progress: Progress, keep: Collection[int | None] = ()) -> None:
    """Write a round's checkpoint: to a temporary name, flushed, renamed; then drop all but the last two and `keep`."""
    final = _place(folder, progress.round)
    partial = folder / (final.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    frame = wire.encode(state, round=progress.round, spool=partial)
    target = partial / "state.frame"
    frame.move_to(target)
    fields = asdict(progress)
    (partial / "progress.json").write_text(records.dumps({**fields, "digest": _digest(fields)}))
    for path in (target, partial / "progress.json", partial):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    flush(folder)
    for old in set(rounds(folder)[:-KEPT]) - set(keep):
        shutil.rmtree(_place(folder, old))


def rounds(folder: Path) -> list[int]:
    """The rounds that have a checkpoint, ascending."""
    names = [path.name.removeprefix("round-") for path in folder.glob("round-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def read(folder: Path, state: type, check: Callable[[Progress], None] = lambda progress: None) -> Found | None:
    """The newest checkpoint that is whole, and that `check` does not find Damaged; None if there is none at all.

    Damaged where there are some and none is whole. OSError where the disk does not give one: it may do so later.
    """
    passed: list[str] = []
    for round in reversed(rounds(folder)[-KEPT:]):
        try:
            progress = _progress(folder, round)
            found = _in_memory(on_disk(folder, round, state))
            check(progress)
        except DAMAGE as error:
            passed.append(f"round {round}: {_reason(error)}")
        else:
            return Found(found, progress, tuple(passed))
    if passed:
        raise Damaged(
            f"{folder}: no checkpoint is whole ({'; '.join(passed)}); nothing was changed: put the folder back from a "
            "copy, or begin anew with another --out"
        )
    return None


def on_disk(folder: Path, round: int, state: type) -> Any:
    """The state of a round's checkpoint, whose named tensors are read when asked for; until KEPT more were written.

    Raises OSError or WireError for a checkpoint that is absent or damaged.
    """
    path = _place(folder, round) / "state.frame"
    frame = Frame.in_file(path)
    found: Any = wire.decode(state, frame)
    if frame.header().round != round:
        raise wire.Illegal(f"it is the state of round {frame.header().round}")
    return found


def kept(folder: Path, round: int, state: type) -> Any:
    """The state of a round whose checkpoint was to stay; Damaged where it is not whole."""
    try:
        return on_disk(folder, round, state)
    except (OSError, wire.WireError) as error:
        raise Damaged(
            f"{folder}: the state of round {round}, the best one, cannot be read ({_reason(error)}): put the folder "
            "back from a copy"
        ) from None


def _progress(folder: Path, round: int) -> Progress:
    fields = json.loads((_place(folder, round) / "progress.json").read_text())
    if not isinstance(fields, dict):
        raise Damaged("progress.json is not as it was written")
    digest = fields.pop("digest", None)  # older ones have none
    if digest is not None and digest != _digest(fields):
        raise Damaged("progress.json is not as it was written")
    try:
        progress = TypeAdapter(Progress).validate_json(json.dumps(fields))
    except ValidationError as error:
        raise Damaged(f"progress.json: {first_wrong(error)}"[:200]) from None
    if progress.round != round:
        raise Damaged(f"progress.json is of round {progress.round}")
    return progress


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(records.dumps(dict(sorted(fields.items()))).encode()).hexdigest()[:16]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{Path(str(error.filename)).name} is missing"
    return str(error) or type(error).__name__


def _place(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}"


def _in_memory(state: Any) -> Any:
    """The state without ties to its file, which a later checkpoint removes."""
    lazy = {f.name: getattr(state, f.name) for f in fields(state) if isinstance(getattr(state, f.name), LazyTensors)}
    return replace(state, **{name: dict(tensors) for name, tensors in lazy.items()})
