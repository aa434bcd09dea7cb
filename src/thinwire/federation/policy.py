"""What may leave a site, and the log of all that did: a file of each, both the site's own."""

from __future__ import annotations

import hashlib
import json
import os
import time
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from thinwire.config import ConfigError
from thinwire.methods import METHODS
from thinwire.wire import Frame, Illegal, Spooled, peek

EMPTY = ("Ready", "Stale")  # kinds that say nothing of a site's rows
STEP = 1 << 22  # bytes of a frame's file that are hashed at a time


class Policy(BaseModel):
    """`methods`: names, as `thinwire methods` lists them. `kinds`: of payloads that may leave, None: any of a method's.

    `max_bytes`: of a frame that leaves, `max_bytes_in`: of one that arrives. `evaluate`: whether scores may leave.
    `code`: classes of methods that are not thinwire's own, as method.path names them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = tuple(sorted(METHODS))
    kinds: tuple[str, ...] | None = None
    max_bytes: PositiveInt = 1 << 38
    max_bytes_in: PositiveInt = 1 << 38
    evaluate: bool = True
    code: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path | None) -> Policy:
        """The policy in a TOML file, the open one without a file; ConfigError names the file and the field."""
        if path is None:
            return cls()
        try:
            policy = cls.model_validate_json(json.dumps(tomllib.loads(path.read_text(encoding="utf-8"))), strict=True)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
        if unknown := set(policy.methods) - set(METHODS):
            raise ConfigError(f"{path}: methods: {min(unknown)!r} is not a method; known: {', '.join(sorted(METHODS))}")
        return policy

    def admit(self, action: str, method: str, path: str | None, frame: Frame) -> None:
        """Illegal if a frame may not be worked on here."""
        if path is not None and path not in self.code:
            raise Illegal(f"this site's policy does not allow the class {path}")
        if path is None and method not in self.methods:
            raise Illegal(f"this site's policy does not allow the method {method}")
        if action == "evaluate" and not self.evaluate:
            raise Illegal("this site's policy does not allow evaluation")
        if len(frame) > self.max_bytes_in:
            raise Illegal(f"this site's policy does not allow a frame of {len(frame)} bytes to come in")

    def release(self, frame: Frame) -> None:
        """Illegal if a frame may not leave."""
        kind = peek(frame).kind
        if self.kinds is not None and kind not in {*self.kinds, *EMPTY}:
            raise Illegal(f"this site's policy does not allow a payload of kind {kind} to leave")
        if len(frame) > self.max_bytes:
            raise Illegal(f"this site's policy does not allow a frame of {len(frame)} bytes to leave")


class Audit:
    """An append-only file with a line of JSON for each frame: time, direction, action, method, round, bytes, sha256."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def note(self, direction: str, action: str, method: str, frame: Frame, verdict: str = "passed") -> None:
        """Append a line, and have it on the disk before the frame goes on."""
        header = peek(frame)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "direction": direction,
            "action": action,
            "method": method,
            "kind": header.kind,
            "run": header.run,
            "round": header.round,
            "client": header.client,
            "bytes": len(frame),
            "sha256": _sha256(frame),
            "verdict": verdict,
        }
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(frame: Frame) -> str:
    if isinstance(frame, Spooled):
        digest = hashlib.sha256()
        with frame.path.open("rb") as file:
            while chunk := file.read(STEP):
                digest.update(chunk)
        return digest.hexdigest()
    return hashlib.sha256(frame).hexdigest()
