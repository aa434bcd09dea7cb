"""Who belongs to a run, from round to round: clients may join it and leave it as it goes on."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.runtime.audit import Book
from thinwire.runtime.job import Job
from thinwire.runtime.store import VersionStore


class Membership:
    """`now`: the clients that belong to the run, `before`: in the last round; all, where the job does not say who."""

    def __init__(self, job: Job, versions: VersionStore) -> None:
        self.job, self.versions = job, versions
        self.now: Sequence[int] = range(len(job.names))
        self.before: Sequence[int] = self.now  # those of the round before
        self.named = len(job.names)  # as the number of kept versions has it

    def turn(self, after: int, book: Book | None) -> None:
        """Ask who belongs to the run after that round; the log has who has come and who has gone."""
        job, before = self.job, self.now
        self.before = before
        if job.members is None:
            return
        self.now = tuple(job.members(after + 1))
        self.versions.keep = job.keep_versions + job.method.versions_each * (len(job.names) - self.named)
        if book is not None and {*before} != {*self.now}:
            book.members(after, job.names, before, self.now)
