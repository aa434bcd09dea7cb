"""A site's worker: one process that holds the model, the rows and the client's memory from its first frame on.

It takes frames from a socket, one at a time, and lets the site's policy and its log see each that comes and goes. It
ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import tomllib
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thinwire.federation import channel
from thinwire.federation.channel import Table
from thinwire.federation.processes import end_with_parent


@dataclass(frozen=True)
class Site:
    """What a worker is told of its site, in a file of JSON.

    `heldout`: a file of rows to score on; without it, and with `hold_out`, the share that the run file says is held
    out of `data` as a run in one process would. `model`, `device`, `threads`: in place of the run file's.
    """

    name: str
    data: str
    folder: str
    socket: str
    heldout: str | None = None
    hold_out: bool = True
    model: str | None = None
    device: str | None = None
    threads: int | None = None
    policy: str | None = None

    def write(self, path: Path) -> None:
        """The file that `load` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Site:
        """The inverse of `write`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass
class _Incoming:
    """Pieces of a frame that are here."""

    total: int
    got: dict[int, int] = field(default_factory=dict)
    small: bytes = b""
    path: Path | None = None


class Refused(Exception):
    """The site does not answer; the message, which the server is told, says why."""


class Worker:
    """One site's worker; `answer` is what it does with a question."""

    def __init__(self, site: Site) -> None:
        from thinwire.federation.policy import Audit, Policy

        self.site, self.folder = site, Path(site.folder)
        self.policy = Policy.load(Path(site.policy) if site.policy else None)
        self.audit = Audit(self.folder / "audit.jsonl")
        self.spool = self.folder / "spool"
        shutil.rmtree(self.spool, ignore_errors=True)
        self.spool.mkdir(parents=True)
        self.incoming: dict[str, _Incoming] = {}
        self.outgoing: dict[str, Any] = {}
        self.settings = ""
        self.run: Any = None

    def answer(self, table: Table, body: bytes) -> tuple[Table, bytes]:
        """The answer to a question: see relay. Its `error` is for the server, and tells nothing of rows."""
        from thinwire.wire import WireError

        try:
            return self._answer(table, body)
        except Refused as refused:
            return {"total": 0, "error": str(refused)}, b""
        except WireError as wrong:
            return {"total": 0, "error": f"{type(wrong).__name__}: {wrong}"}, b""
        except ValueError as error:
            from thinwire.data.errors import DataError

            traceback.print_exc()
            told = "its rows cannot be used; its own log says why" if isinstance(error, DataError) else str(error)
            return {"total": 0, "error": f"{type(error).__name__}: {told}"}, b""
        except Exception as error:
            traceback.print_exc()
            return {"total": 0, "error": f"the site failed: {type(error).__name__}; its own log says more"}, b""

    def _answer(self, table: Table, body: bytes) -> tuple[Table, bytes]:
        transfer, offset, total = str(table["transfer"]), int(table["offset"]), int(table["total"])
        size = int(table["room"])
        if total == 0:
            return self._piece(transfer, offset, size)
        if not self._whole(transfer, offset, total, body):
            return {"total": 0}, b""
        frame = self._frame(transfer)
        try:
            answer = self._work(str(table["action"]), table, frame)
        finally:
            self._drop(frame)
        for old in self.outgoing.values():  # one site answers one frame at a time: what is left of others is stale
            self._drop(old)
        self.outgoing = {transfer: answer}
        return self._piece(transfer, 0, size)

    def _whole(self, transfer: str, offset: int, total: int, body: bytes) -> bool:
        """Take in a piece; whether all are here."""
        if not re.fullmatch("[0-9a-f]{16}", transfer):
            raise Refused("a transfer without a name")
        if total > self.policy.max_bytes_in:
            raise Refused(f"this site's policy does not allow a frame of {total} bytes to come in")
        at = self.incoming.setdefault(transfer, _Incoming(total))
        if total != at.total or offset in at.got or not body or offset < 0 or offset + len(body) > total:
            raise Refused("pieces of a frame that do not fit together")
        at.got[offset] = len(body)
        if len(body) == total:
            at.small = body
            return True
        if at.path is None:
            at.path = self.spool / f"{transfer}.down"
            at.path.touch(mode=0o600)
        with at.path.open("r+b") as file:
            file.seek(offset)
            file.write(body)
        return sum(at.got.values()) == total

    def _frame(self, transfer: str) -> Any:
        from thinwire.wire import Spooled

        at = self.incoming.pop(transfer)
        for other in self.incoming.values():
            if other.path is not None:
                other.path.unlink(missing_ok=True)
        self.incoming.clear()
        return at.small if at.path is None else Spooled(at.path, at.total)

    def _piece(self, transfer: str, offset: int, size: int) -> tuple[Table, bytes]:
        from thinwire.wire import Spooled

        if transfer not in self.outgoing:
            raise Refused("the rest of a reply that is not here any more")
        frame = self.outgoing[transfer]
        if isinstance(frame, Spooled):
            with frame.path.open("rb") as file:
                file.seek(offset)
                piece = file.read(size)
        else:
            piece = frame[offset : offset + size]
        return {"offset": offset, "total": len(frame)}, piece

    def _drop(self, frame: Any) -> None:
        from thinwire.wire import Spooled

        if isinstance(frame, Spooled):
            frame.remove()

    def _work(self, action: str, table: Table, frame: Any) -> Any:
        """The reply to a whole frame."""
        from thinwire import memory, wire
        from thinwire.config import method_name
        from thinwire.federation.fingerprint import difference

        header = wire.peek(frame)
        run = self._prepared(str(table["settings"]))
        name = method_name(run.settings.method)
        try:
            self.policy.admit(action, name, run.path, frame)
            run.expect(header, action)
            if (other := difference(run.fingerprints, table)) is not None:
                raise Refused(f"{self.site.name} cannot take part: {other}")
        except Exception as error:
            self.audit.note("in", action, name, frame, f"refused: {error}")
            raise
        self.audit.note("in", action, name, frame)
        answer = run.actions[action](frame, self.spool, int(table["counted"]))
        memory.trim()
        try:
            self.policy.release(answer)
        except Exception as error:
            self.audit.note("out", action, name, answer, f"refused: {error}")
            self._drop(answer)
            raise
        self.audit.note("out", action, name, answer)
        return answer

    def _prepared(self, settings: str) -> Any:
        if self.run is None or self.settings != settings:
            from thinwire.federation.visits import Visits

            told = json.loads(settings)
            method = tomllib.loads(told["toml"]).get("method", {})
            if (path := method.get("path")) is not None and path not in self.policy.code:
                raise Refused(f"this site's policy does not allow the class {path}")  # before it is imported
            self.run, self.settings = None, ""  # one model in memory, not two
            self.run, self.settings = Visits(self.site, told, self.folder), settings
        return self.run


def main(path: Path) -> None:
    """Serve the site in a file until the parent ends."""
    end_with_parent()
    site = Site.load(path)
    server = channel.listen(Path(site.socket))
    import thinwire.federation.visits  # noqa: F401 - takes seconds, and nobody waits for it now

    worker: Worker | None = None
    try:
        while True:
            link, _ = server.accept()
            with link, contextlib.suppress(ConnectionError):
                table, body = channel.receive(link)
                if worker is None:
                    worker = Worker(site)
                channel.send(link, *worker.answer(table, body))
    finally:
        Path(site.socket).unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
