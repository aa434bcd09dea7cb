"""What a user did wrong when naming a model."""

from __future__ import annotations

from thinwire.errors import UserError


class ModelError(UserError):
    """A model that cannot be used; the message is one clear line for the user."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
