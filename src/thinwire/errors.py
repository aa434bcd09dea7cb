"""What a user can mend."""

from __future__ import annotations


class ConfigError(ValueError):
    """The run file, or what a command was given, is wrong; the message is one line that names it."""


class RunError(RuntimeError):
    """A run cannot go on, or has come to no result; the message is one line that says why and what can be done."""


class Damaged(RunError):
    """A file that a run has kept is not as it was written."""
