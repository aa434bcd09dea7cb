"""Whether sandboxes can be made here: bubblewrap is there, and the system lets it."""

from __future__ import annotations

from functools import cache

import pytest

from thinwire.errors import ConfigError
from thinwire.federation.sandbox import Sandbox


@cache
def _made() -> Sandbox | str:
    try:
        return Sandbox.of([])
    except ConfigError as error:
        return str(error)


def sandbox() -> Sandbox:
    """One, or the test is skipped with the reason."""
    made = _made()
    if isinstance(made, str):
        pytest.skip(made)
    return made
