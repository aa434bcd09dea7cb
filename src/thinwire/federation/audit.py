"""The log of all that came to a site and all that left it: each line on the disk first, and bound to the one before."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from thinwire.runtime.audit import sha256 as sha256
from thinwire.wire import Frame

NONE = "0" * 64  # the hash before the first line
SHOWN = 500  # characters of a verdict


class Audit:
    """An append-only file with a line of JSON for each frame and each answer; `before` is the hash of the line before.

    A line has time, direction, action, method, template, kind, run, round, client, bytes, sha256, verdict and before.
    Lines of an older thinwire, without `before`, may stand at its beginning.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._last: str | None = None
        self._cut = False  # whether the file's last line is without its end

    def note(self, direction: str, content: Frame | bytes, verdict: str = "passed", **about: Any) -> None:
        """Append a line of a frame, or of bytes that are none, and have it on the disk before anything else is done."""
        frame = Frame(content) if isinstance(content, bytes) else content
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "direction": direction,
            **about,
            "bytes": len(frame),
            "sha256": sha256(frame),
            "verdict": verdict[:SHOWN],
            "before": self._before(),
        }
        written = json.dumps(line).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if self._cut:
                written = b"\n" + written
            if os.write(descriptor, written) < len(written):
                raise OSError(f"{self.path}: the disk is full")
            os.fsync(descriptor)
        except OSError:
            self._last = None  # whatever is there now is read again
            raise
        finally:
            os.close(descriptor)
        self._last, self._cut = _hash(written.strip(b"\n")), False

    def unanswered(self) -> bool:
        """Whether the last line is of a frame that came and was let in: whoever was at work on it has ended."""
        lines, _ = _lines(self.path)
        try:
            last = json.loads(lines[-1]) if lines else {}
        except ValueError:
            return False
        return last.get("direction") == "in" and last.get("verdict") == "passed"

    def _before(self) -> str:
        if self._last is None:
            lines, self._cut = _lines(self.path)
            self._last = _hash(lines[-1]) if lines else NONE
        return self._last


def broken(path: Path) -> str | None:
    """What is wrong with a log, in one line that names the first bad one; None where each follows from the last."""
    before, chained = NONE, False
    lines, _ = _lines(path)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            named = entry.get("before") if isinstance(entry, dict) else ""
        except ValueError:
            named = ""
        if named != before and (named is not None or chained):
            return (
                f"{path}:{number}: does not follow from the line before: lines were changed or removed, or one was cut"
            )
        chained, before = chained or named is not None, _hash(line)
    return None


def sent(path: Path) -> dict[tuple[int, int, int], set[str]]:
    """(run, round, client) -> the hashes of the replies to training that have left, by a log."""
    found: dict[tuple[int, int, int], set[str]] = {}
    for line in _lines(path)[0]:
        entry = json.loads(line)
        if (entry["direction"], entry.get("action"), entry["verdict"]) == ("out", "train", "passed"):
            found.setdefault((entry["run"], entry["round"], entry["client"]), set()).add(entry["sha256"])
    return found


def _lines(path: Path) -> tuple[list[bytes], bool]:
    """The lines, and whether the last one is without its end."""
    content = path.read_bytes() if path.exists() else b""
    return [line for line in content.split(b"\n") if line], bool(content) and not content.endswith(b"\n")


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
