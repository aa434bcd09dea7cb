"""Whether a run can keep to its agreement of who counts how much: refused in a line before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from thinwire.aggregate.weights import Agreement
from thinwire.config import ConfigError, Run, method_name
from thinwire.config.explain import nearest
from thinwire.core import Averaged
from thinwire.runtime.cohort import Cyclic, Only, Segment, Uniform

TABLE = "federation.weights"


def agreement_of(run: Run) -> Agreement | None:
    """The run's agreement; None where there is none."""
    return None if run.federation is None else run.federation.weights


def check_agreement(run: Run, names: Sequence[str]) -> None:
    """ConfigError for an agreement that cannot be kept with clients of these names, the method, or the cohorts."""
    agreed, method = agreement_of(run), method_name(run.method)
    if run.federation is not None and run.federation.late:
        if not isinstance(run.method, Averaged) or not run.method.additive:
            raise ConfigError(f"federation.late: a reply of {method}, as it is set, means nothing after its round")
        if run.privacy is not None:
            raise ConfigError("federation.late: what a private run may spend is counted by who is drawn for a round")
    if agreed is None:
        return
    reports = {field.name for field in fields(run.method.Up)}
    if not isinstance(run.method, Averaged):
        raise ConfigError(f"{TABLE}: {method} takes no mean of its clients' replies: each counts as it has it")
    for name, needed in (("examples", agreed.by == "examples"), ("loss", agreed.fair > 0)):
        if needed and name not in reports:
            raise ConfigError(f"{TABLE}: the clients of {method} do not report their {name}")
    for name in agreed.table or ():
        if name not in names:
            raise ConfigError(f"{TABLE}.table: no client is called {name!r}{nearest(name, names)}")
    if agreed.table is not None and run.federation is not None and run.federation.join:
        raise ConfigError("federation.join: shares by a table are for the sites that it names, and no others")
    lacking = [name for name in names if agreed.table is not None and name not in agreed.table]
    if lacking:
        raise ConfigError(f"{TABLE}.table: no share for {lacking[0]!r}")
    sizes = [size_of(segment, len(names)) for segment in run.cohort]
    for field, bad, size in (("cap", agreed.cap, min(sizes)), ("floor", agreed.floor, max(sizes))):
        if (bad * size < 1 - 1e-9) if field == "cap" else (bad * size > 1 + 1e-9):
            many = "of one client" if size == 1 else f"of {size} clients"
            least = "at least" if field == "cap" else "at most"
            raise ConfigError(
                f"{TABLE}.{field}: {bad:g} cannot hold in a round {many}; there it is {1 / size:.4g} {least}"
            )


def size_of(segment: Segment, clients: int) -> int:
    """How many of so many clients a round of that segment has."""
    if isinstance(segment, Uniform):
        return min(segment.n, clients)
    return 1 if isinstance(segment, Cyclic) else len(segment.clients) if isinstance(segment, Only) else clients
