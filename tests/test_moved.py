"""Modules by their old names, for one release."""

from __future__ import annotations

import importlib
import sys

import pytest

from thinwire import moved


@pytest.mark.parametrize("old", sorted(moved.PLACES))
def test_an_old_name_is_the_module_that_is_there_now(old: str) -> None:
    if old == "perturb.gpu":
        pytest.importorskip("triton")
    now = importlib.import_module(f"thinwire.{moved.PLACES[old]}")
    spec = now.__spec__
    sys.modules.pop(f"thinwire.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"thinwire\.{old} is thinwire\.{moved.PLACES[old]} now"):
        found = importlib.import_module(f"thinwire.{old}")
    assert found is now
    assert now.__spec__ is spec


def test_what_was_never_there_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("thinwire.nothing")
