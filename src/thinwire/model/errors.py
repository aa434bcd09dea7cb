"""What a user did wrong when naming a model."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be used; the message is one clear line for the user."""
