"""The benchmarks: each can be imported, and the picture of a comparison names all curves, however many there are."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_each_is_imported() -> None:
    """In a process of its own: one of them has the name of a module of the tests."""
    code = "import importlib, pathlib; [importlib.import_module(p.stem) for p in sorted(pathlib.Path().glob('*.py'))]"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_picture_of_many_methods_tells_them_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("results", BENCHMARKS / "results.py")
    assert spec is not None
    assert spec.loader is not None
    results: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    lines = [
        {"name": f"m{i}", "bytes_down": 1, "curve": [(r, 10.0**r, 0.7 - 0.01 * i * r) for r in range(3)], "scores": {}}
        for i in range(35)
    ]
    lines[3]["curve"] = [(0, 0.0, 0.7), (1, 10.0, 467.0), (2, 100.0, None)]  # which has diverged
    lines += [{"name": n, "bytes_down": None, "curve": [], "scores": {"heldout loss": [0.7, 0]}} for n in ("base",)]
    results.draw({"lines": lines}, tmp_path / "many.svg")
    picture = (tmp_path / "many.svg").read_text()
    assert [f"m{i}" for i in range(35)] == re.findall(r"<!-- (m\d+) -->", picture)
    assert "<!-- 400 -->" not in picture
    styles = {(i % 10, results.STROKES[i // 10], results.MARKS[i // 10]) for i in range(40)}
    assert len(styles) == 40


def test_cells_that_are_there_are_known_and_one_that_was_cut_off_is_not(tmp_path: Path) -> None:
    """What `records` reads are rounds: cells are none, and were once all done again."""
    file = tmp_path / "cells.jsonl"
    file.write_text('{"method": "fedit", "seed": 0, "loss": 0.3}\n{"method": "fed')
    code = f"import pathlib, cells; print(cells.read(pathlib.Path({str(file)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert done.stdout == "[{'method': 'fedit', 'seed': 0, 'loss': 0.3}]\n"
