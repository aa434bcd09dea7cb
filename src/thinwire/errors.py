"""What a user can mend."""

from __future__ import annotations


class ConfigError(ValueError):
    """The run file, or what a command was given, is wrong; the message is one line that names it."""
