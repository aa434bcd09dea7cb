"""What can go wrong that is no bug of ours.

    UserError           what a user can mend, in one line; commands end with status 2
    ├── ConfigError     the run file, or what a command was given
    ├── DataError       the rows (data/errors.py)
    │   └── NoRowsLeft  none of a set fits
    └── ModelError      the model (model/errors.py)
    RunError            a run cannot go on; commands end with status 1
    ├── Damaged         a file that it has kept is not as it was written
    └── Paused          it was asked to end, and has after a whole round; commands end with status 75

Bytes from elsewhere have a tree of their own, in wire/errors.py: they cost a client its round, and end nothing.
"""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """What a user can mend; the message is one line that names it."""


class ConfigError(UserError):
    """The run file, or what a command was given, is wrong; the message is one line that names it."""


def first_wrong(error: Any) -> str:
    """What a validation of pydantic's found first: where, and what; nothing of the value."""
    first = error.errors(include_input=False, include_url=False)[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


class RunError(RuntimeError):
    """A run cannot go on, or has come to no result; the message is one line with the reason and what can be done."""


class Damaged(RunError):
    """A file that a run has kept is not as it was written."""


class Paused(RunError):
    """A run was asked to end before its last round, and has after a whole one: it goes on from there."""
