"""Why replies did not count, by kind: a few words that an alarm can be set on."""

from __future__ import annotations

from thinwire.records import Record

KINDS = {  # kind -> how its reasons begin
    "late": ("late:",),
    "away": ("not connected",),
    "engine": ("the engine ",),
    "worker": ("the site's worker", "its rows cannot be used"),
    "illegal": ("Illegal", "Malformed", "Corrupt", "TooLarge", "ValueError"),
}
REFUSED = ("policy", "does not allow", "cannot take part")  # of what a site does not let itself be asked
OTHER, LEFT_OUT = "other", "left out"
ALL = (*KINDS, "refused", LEFT_OUT, OTHER)


def kind_of(reason: str) -> str:
    """The kind of a reason that stands in a visit's `error`."""
    if any(mark in reason for mark in REFUSED):
        return "refused"
    return next((kind for kind, begins in KINDS.items() if reason.startswith(begins)), OTHER)


def dropped(visit: Record) -> tuple[str, str] | None:
    """(kind, reason) of a visit whose reply did not count; None for one that did."""
    if error := visit.get("error"):
        return kind_of(str(error)), str(error)
    return (LEFT_OUT, str(left)) if (left := visit.get("left_out")) else None
