"""The audit of a run file: what one reply gives away, what a whole run does, and what it costs to find out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from thinwire import assemble
from thinwire.assemble import Start
from thinwire.config import ConfigError, Run, method_name
from thinwire.data.batch import Example
from thinwire.keys import Key
from thinwire.leaks.canaries import LEAST, Leak, leak
from thinwire.leaks.reconstruct import Found, reconstructed
from thinwire.leaks.visits import Visits
from thinwire.privacy.released import REPORTS
from thinwire.privacy.secrets import Secrets, SystemSecrets
from thinwire.runtime.course import Watch
from thinwire.runtime.seats import Seats

DELTA = 1e-5  # of a run that promises none


class Size(NamedTuple):
    """How much is tried. `rows` of `candidates` make a small batch, so often: `tries`; `canaries`: 0 for none."""

    candidates: int = 16
    tries: int = 8
    rows: int = 1
    canaries: int = 64
    guesses: int = 0  # 0: half of the canaries


class View(NamedTuple):
    """Who looks at what: `private`, the run as it asks, or without [privacy]; `outside`: without the server's part."""

    name: str
    private: bool = False
    outside: bool = False


class Row(NamedTuple):
    """What one view gives away."""

    view: View
    found: Found
    leak: Leak | None


class Audit:
    """A run file's audit. ConfigError, DataError, ModelError: it cannot be audited."""

    def __init__(self, run: Run, size: Size, secrets: Secrets | None = None) -> None:
        check(run, size)
        self.size, self.secrets = size, secrets or SystemSecrets()
        self.run, self.rows = assemble.prepared(run)
        if not self.rows.clients:
            raise ConfigError("data: no client has rows here")
        most = size.canaries + max(map(len, self.rows.clients.values()))
        if run.privacy is not None and run.privacy.level == "record" and run.privacy.delta >= 1 / most:
            raise ConfigError(
                f"privacy.delta: {run.privacy.delta:g} is not below one in {most:,} rows, canaries counted"
            )
        self.name, self.views = method_name(run.method), views_of(run)

    @property
    def guesses(self) -> int:
        """How many canaries are guessed about."""
        return self.size.guesses or self.size.canaries // 2

    @property
    def cost(self) -> str:
        """What it takes, in a line."""
        size, seats, clients = self.size, Seats(Key.root(self.run.seed), self.run.rounds), len(self.rows.clients)
        once = len(self.views) * (2 + size.tries + size.candidates)
        cohorts = [len(seats.cohort(self.run.cohort, clients, n + 1)) for n in range(self.run.rounds)]
        runs = sum(not (view.private and self._client and not view.outside) for view in self.views)
        line = f"{once:,} visits of one client"
        if not size.canaries:
            return f"{line}, no canaries"
        forward = size.canaries * (2 + 2 * self.run.rounds)
        return (
            f"{line}, then {runs} run{'s' * (runs > 1)} of {self.run.rounds:,} rounds with {size.canaries:,} canaries: "
            f"{sum(cohorts) * runs:,} visits, and {forward * runs:,} rows forward"
        )

    @property
    def _client(self) -> bool:
        return self.run.privacy is not None and self.run.privacy.level == "client"

    def __call__(self) -> list[Row]:
        """All of it, a row a view."""
        start, size, made = assemble.begin(self.run, self.rows), self.size, list[Row]()
        delta = DELTA if self.run.privacy is None else self.run.privacy.delta
        key = Key.root(self.run.seed).fold("audit-privacy")
        for view in self.views:
            run = unmasked(self.run) if view.private else self.run.model_copy(update={"privacy": None})
            asked = start._replace(run=run)
            with tempfile.TemporaryDirectory(prefix="thinwire-audit-") as place:
                visits = Visits(asked.job(Path(place) / "visits", Watch()), Path(place), self.secrets)
                pool = candidates_of(asked, visits, size.candidates, key.fold("candidates"))
                found = reconstructed(visits, pool, size.tries, size.rows, key, view.outside)
                leaked = None
                if size.canaries and not (view.private and self._client and not view.outside):
                    (folder := Path(place) / "run").mkdir()
                    leaked = leak(asked, size.canaries, self.guesses, self.secrets, folder, delta)
            made.append(Row(view, found, leaked))
        return made


def views_of(run: Run) -> list[View]:
    """Who is asked about. Under masks the worst server has all other clients in league: it sees one reply again."""
    if run.privacy is None:
        return [View("server")]
    open_, asked = View("server, without privacy"), ", as asked"
    if run.privacy.secure is not None:
        if run.privacy.level is None:
            return [View("server and all others in league")]
        if run.privacy.level == "client":  # whose noise is on the sum before anybody sees it
            return [open_, View("server and all others, as asked", private=True, outside=True)]
        asked = " and all others in league, as asked"
    if run.privacy.level == "record":
        return [open_, View(f"server{asked}", private=True)]
    return [
        open_,
        View("server, as asked", private=True),
        View("all others, as asked", private=True, outside=True),
    ]


def unmasked(run: Run) -> Run:
    """The run without its masks, behind which nobody hides from all others together."""
    if run.privacy is None or run.privacy.secure is None:
        return run
    privacy = None if run.privacy.level is None else run.privacy.model_copy(update={"secure": None})
    return run.model_copy(update={"privacy": privacy})


def check(run: Run, size: Size) -> None:
    """ConfigError for what cannot be audited."""
    name = method_name(run.method)
    if run.federation is not None and run.federation.sites:
        raise ConfigError("federation.sites: the audit runs in one process, on rows that are here; leave them out")
    if run.data.loss == "dpo":
        raise ConfigError('data.loss: the audit makes canaries of one answer, and rows of "dpo" have two')
    if run.data.loss == "contrastive":
        raise ConfigError("data.loss: the audit looks for each row's own loss, and a pair's depends on its batch")
    if run.method.moves_base:
        raise ConfigError(f"method: {name} moves weights that its view freezes, and the audit compares what is trained")
    if run.method.hollow:
        raise ConfigError(f"method: a client of {name} trains a model of its own, which the audit cannot look into")
    if not {field.name for field in fields(run.method.Up) if field.metadata.get("release")} - REPORTS.keys():
        raise ConfigError(f"method: of what a client of {name} learns nothing leaves it; there is nothing to audit")
    if size.canaries and size.canaries < LEAST:
        raise ConfigError(f"--canaries: {size.canaries} are too few for any bound; {LEAST} at least, or 0 for none")
    if size.guesses and not LEAST - 2 <= size.guesses <= size.canaries:
        raise ConfigError(f"--guesses: {size.guesses} about {size.canaries} canaries; {LEAST - 2} at least, one each")
    if not 1 <= size.rows <= min(4, size.candidates - 1):
        raise ConfigError(f"--rows: {size.rows} of {size.candidates} candidates; 1 to 4, and fewer than there are")


def candidates_of(start: Start, visits: Visits, count: int, key: Key) -> Sequence[Example]:
    """Rows that are no secret of the client's: public, held out, or else other clients'; DataError, ConfigError."""
    run, rows = start.run, start.rows
    if visits.job.public is not None:
        pool: Sequence[Example] = visits.job.public.examples
    elif rows.splits:
        some = _few([row for held in rows.splits.values() for row in held], 4 * count, key)
        pool = assemble.client_data(run, some, start.net).examples
    else:
        pool = [e for id, data in enumerate(visits.job.clients) if id != visits.id for e in data.examples]
    distinct = list({(e.prompt, e.answer): e for e in pool}.values())
    if len(distinct) < count:
        raise ConfigError(f"--candidates: {count}, and there are {len(distinct)} rows that are public, or held out")
    return [distinct[i] for i in key.permutation(len(distinct))[:count]]


def _few(rows: list[Any], count: int, key: Key) -> list[Any]:
    """Some of the rows, which need not all be tokenised."""
    return [rows[i] for i in key.fold("some").permutation(len(rows))[:count]]


def record(audit: Audit, made: Sequence[Row]) -> dict[str, Any]:
    """What was found, as JSON has it."""

    def each(row: Row) -> dict[str, Any]:
        found = row.found
        leaked = None
        if row.leak is not None:
            scores = {name: score._asdict() for name, score in row.leak.scores.items()}
            leaked = row.leak._asdict() | {"scores": scores, "beyond": row.leak.beyond}
        return {
            **row.view._asdict(),
            "update": found.update._asdict(),
            "tokens": None if found.tokens is None else found.tokens._asdict(),
            "candidates": None if found.guess is None else found.guess._asdict(),
            "canaries": leaked,
        }

    return {
        "method": audit.name,
        "seed": audit.run.seed,
        **audit.size._asdict(),
        "guesses": audit.guesses,
        "views": [each(row) for row in made],
    }
