"""The page on the architecture: its drawing is the code's, and each part of the package has its paragraph."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from test_imports import FLOORS

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

import graph  # noqa: E402


def test_the_drawing_is_the_codes() -> None:
    assert graph.DRAWING.read_text() == graph.drawing(), "python docs/graph.py draws it anew"


def test_an_import_more_is_another_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, more = graph.drawing(), graph.parts() | {("trackers", "wire")}
    monkeypatch.setattr(graph, "parts", lambda: more)
    assert graph.drawing() != drawn


def test_each_part_has_a_paragraph_and_no_other_has() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    described = re.findall(r"^\*\*`(\w+)`\*\*", page, re.MULTILINE)
    assert sorted(described) == sorted(set().union(*FLOORS))
