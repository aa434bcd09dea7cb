"""A site's worker: one process that holds the model, the rows and the client's memory from its first frame on.

It takes frames from a socket, one at a time, and lets the site's policy and its log see each that comes and goes. It
ends with the process that started it. Of a site of several processes it is the first: see ranks.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from thinwire.federation import channel
from thinwire.federation.asked import Question, Refused
from thinwire.federation.channel import Table
from thinwire.federation.incoming import Incoming
from thinwire.federation.processes import end_with_parent
from thinwire.federation.site import Site

if TYPE_CHECKING:
    from thinwire.federation.ranks import Ranks
    from thinwire.federation.site_run import Visits
    from thinwire.wire import Frame

FAILED = "its rows cannot be used, or its work with them failed; its own log says why"
SPARE = 1 << 26  # bytes of the disk that stay free
MOST = 300  # characters of an error that a server receives


class Worker:
    """One site's worker; `answer` is what it does with a question. `ranks`: the site's other processes."""

    def __init__(self, site: Site, ranks: Ranks | None = None) -> None:
        from thinwire.federation.audit import Audit
        from thinwire.federation.policy import Policy
        from thinwire.federation.progress import Notices
        from thinwire.federation.spent import Spent

        self.site, self.folder, self.ranks = site, Path(site.folder), ranks
        self.policy = Policy.load(Path(site.policy) if site.policy else None)
        self.audit, self.spent = Audit(self.folder / "audit.jsonl"), Spent(self.folder)
        self.notices = Notices(self.folder / "notices.txt")
        if self.spent.damaged is not None:
            self.notices.add(f"{site.name}: does not answer: {self.spent.damaged}; put it back from a copy")
        self.spool = self.folder / "spool"
        shutil.rmtree(self.spool, ignore_errors=True)
        self.spool.mkdir(parents=True)
        self.incoming: Incoming | None = None
        self.outgoing: tuple[str, Frame] | None = None
        self.settings = ""
        self.run: Visits | None = None
        if self.audit.unanswered():
            self.audit.note("out", b"", "ended: no answer was given")

    def answer(self, table: Table, body: bytes) -> tuple[Table, bytes]:
        """The answer to a question: see relay. Its `error` is for the server, and reveals nothing of rows."""
        from thinwire.wire import WireError

        try:
            return self._answer(self._question(table, body), body)
        except Refused as refused:
            return {"total": 0, "error": str(refused)}, b""
        except WireError as wrong:
            return {"total": 0, "error": f"{type(wrong).__name__}: {wrong}"[:MOST]}, b""
        except Exception:
            traceback.print_exc()
            return {"total": 0, "error": FAILED}, b""

    def _question(self, table: Table, body: bytes) -> Question:
        try:
            return Question.of(table)
        except Refused as wrong:
            self.audit.note("in", body, f"refused: {wrong}")
            raise

    def _answer(self, question: Question, body: bytes) -> tuple[Table, bytes]:
        if question.total == 0:
            return self._piece(question)
        frame = self._taken(question, body)
        if frame is None:
            return {"total": 0}, b""
        self._drop_outgoing()  # a site answers one frame at a time: what is left of another is stale
        try:
            self.outgoing = (question.transfer, self._work(question, frame))
        finally:
            frame.remove()
        return self._piece(question.model_copy(update={"offset": 0}))

    def _taken(self, question: Question, body: bytes) -> Frame | None:
        """Take in a piece: the frame once all of it is here, else None. There is one transfer at a time."""
        from thinwire.wire import Frame

        transfer, total = question.transfer, question.total
        if total > self.policy.max_bytes_in:
            self._refuse(question, body, f"this site's policy does not allow a frame of {total} bytes to come in")
        at = self.incoming
        if at is None or at.transfer != transfer:
            self._drop_incoming()
            self._drop_outgoing()
            if len(body) != total and total + SPARE > shutil.disk_usage(self.spool).free:
                self._refuse(question, body, f"this site has no room for a frame of {total} bytes")
            self.incoming = at = Incoming(transfer, total)
        try:
            if total != at.total:
                raise Refused("pieces of a frame that do not fit together")
            at.add(question.offset, question.offset + len(body))
        except Refused as wrong:
            self._drop_incoming()
            self._refuse(question, body, str(wrong))
        if len(body) == total:
            self.incoming = None
            return Frame(body)
        if at.path is None:
            at.path = self.spool / f"{transfer}.down"
            at.path.touch(mode=0o600)
        with at.path.open("r+b") as file:
            file.seek(question.offset)
            file.write(body)
        if not at.whole:
            return None
        self.incoming = None
        return Frame.in_file(at.path, at.total)

    def _refuse(self, question: Question, body: bytes, why: str) -> NoReturn:
        self.audit.note("in", body, f"refused: {why}", action=question.action)
        raise Refused(why)

    def _piece(self, question: Question) -> tuple[Table, bytes]:
        if self.outgoing is None or self.outgoing[0] != question.transfer:
            raise Refused("the rest of a reply that is not here any more")
        frame = self.outgoing[1]
        return {"offset": question.offset, "total": len(frame)}, frame.read(question.offset, question.room)

    def _drop_incoming(self) -> None:
        if self.incoming is not None:
            lost, self.incoming = self.incoming, None
            self.audit.note("in", b"", f"dropped: {sum(e - s for s, e in lost.got)} of {lost.total} bytes came")
            if lost.path is not None:
                lost.path.unlink(missing_ok=True)

    def _drop_outgoing(self) -> None:
        if self.outgoing is not None:
            self.outgoing[1].remove()
            self.outgoing = None

    def _work(self, question: Question, frame: Frame) -> Frame:
        """The reply to a whole frame. The log has what came before it is worked on, and what leaves before it goes."""
        from thinwire import memory, wire
        from thinwire.federation.audit import sha256
        from thinwire.federation.fingerprint import difference
        from thinwire.federation.policy import EMPTY, task_of
        from thinwire.runtime.endpoint import KEYED

        action = question.action
        about: dict[str, Any] = {"action": action}
        try:
            header = frame.header()
            about |= {"kind": header.kind[:40], "run": header.run, "round": header.round, "client": header.client}
            run = self._asked(question.settings)
            run.seat(question.site, header.client)
            about = {"action": action, "method": run.ran, "template": task_of(run.settings.data), **about}
            self.policy.admit(action, run.settings, run.path, frame)
            request = sha256(frame)
            kept = run.replies.get(action, header.round, request)
            run.expect(header, action, kept is not None)
        except Exception as error:
            why = str(error) if isinstance(error, Refused | wire.WireError) else FAILED
            self.audit.note("in", frame, f"refused: {why}", **about)
            self._notice(action, error)
            raise
        self.audit.note("in", frame, **about)
        try:
            if kept is not None:
                self.audit.note("out", kept, "passed", **about | {"kind": kept.header().kind, "again": True})
                return kept
            run.allow()
            run.load()
            if (other := difference(run.fingerprints, question.hashes())) is not None:
                raise Refused(f"{self.site.name} cannot take part: {other}")
            if self.ranks is not None:
                self.ranks.asked(question, header.client)
                run.together = self.ranks.together
            answer = self._done(run, action, frame, question.counted)
        except Exception as error:
            # what went wrong with rows, or after a look at them, is the site's to know: the same words for all of it
            why = str(error) if isinstance(error, Refused) else FAILED
            self.audit.note("out", why.encode(), f"error: {why}", **about | {"kind": "error"})
            self._notice(action, error)
            if not isinstance(error, Refused):
                traceback.print_exc()
            raise Refused(why) from None
        memory.trim()
        about["kind"] = answer.header().kind
        try:
            self.policy.release(answer)
            if about["kind"] not in EMPTY:
                if action not in KEYED:  # those are in this process alone
                    run.replies.keep(action, header.round, request, answer)
                self.spent.add(run.name, action, header.round)
        except Exception as error:
            self.audit.note("out", answer, f"refused: {error}", **about)
            self._notice(action, error)
            answer.remove()
            raise
        self.audit.note("out", answer, **about)
        return answer

    def _done(self, run: Visits, action: str, frame: Frame, counted: int) -> Frame:
        from thinwire.wire import WireError

        if shutil.disk_usage(self.spool).free < SPARE:
            raise Refused("this site's disk is full")
        run.read()
        try:
            return run.answer(action, frame, counted)
        except WireError as error:  # of the frame: methods raise it for what they receive, before they look at rows
            raise Refused(f"{type(error).__name__}: {error}"[:MOST]) from None

    def _notice(self, action: str, error: Exception) -> None:
        """Have the operator of this site read why it does not answer; what the server receives may hold less."""
        kind = "" if isinstance(error, Refused | ValueError) else f"{type(error).__name__}: "
        self.notices.add(f"{self.site.name}: does not {action}: {kind}{error}")

    def _asked(self, settings: str) -> Visits:
        if self.run is None or self.settings != settings:
            from thinwire.federation.site_run import Visits

            asked = Visits(self.site, self.policy, settings, self.folder, self.spent)
            self.run, self.settings = None, ""  # one model in memory, not two
            self.run, self.settings = asked, settings
        return self.run


def main(path: Path) -> None:
    """Serve the site in a file until the parent ends."""
    end_with_parent()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    site = Site.load(path)
    server = channel.listen(Path(site.socket))
    import thinwire.federation.site_run  # noqa: F401 - takes seconds, and nobody waits for it now
    from thinwire.methods import METHODS

    list(METHODS.values())  # imported now, not in a visit's time

    ranks: Ranks | None = None
    if site.processes > 1:
        from thinwire.federation.progress import Notices
        from thinwire.federation.ranks import Ranks

        ranks = Ranks(path, Notices(Path(site.folder) / "notices.txt").add)
    worker: Worker | None = None
    try:
        while True:
            link, _ = server.accept()
            with link, contextlib.suppress(ConnectionError):
                table, body = channel.receive(link)
                if worker is None:
                    worker = Worker(site, ranks)
                # the kernel ends this process when time is up, whatever it is at: no handler of ours could
                signal.setitimer(signal.ITIMER_REAL, worker.policy.seconds)
                answer = worker.answer(table, body)
                signal.setitimer(signal.ITIMER_REAL, 0)
                channel.send(link, *answer)
    finally:
        Path(site.socket).unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
