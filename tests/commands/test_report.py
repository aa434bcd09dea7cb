"""thinwire report from the command line: a page from a real run, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import CHOICES, tiny_folder, tiny_rows, write_jsonl
from typer.testing import CliRunner

from thinwire.cli import app

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")


def test_a_real_run_has_its_page(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(24, closed=True))
    (tmp_path / "run.toml").write_text(
        f"""
name = "ward"
rounds = 1
threads = 1
model = {{ path = "{tmp_path / "model"}" }}
method = {{ name = "fedavg", steps = 1 }}
eval = {{ prompts = ["A public question"], max_new_tokens = 2 }}
[data]
path = "{tmp_path / "rows.jsonl"}"
clients = 2
heldout = 4
prompt = "{{input}}: it was"
answer = " {{output}}"
choices = ["{CHOICES[0]}", "{CHOICES[1]}"]
"""
    )
    assert CliRunner().invoke(app, ["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")]).exit_code == 0
    made = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "pages" / "ward.html")])
    assert made.exit_code == 0, made.output
    page = (tmp_path / "pages" / "ward.html").read_text()
    assert "<h1>ward</h1>" in page
    assert page.count("A public question") == 1
    assert ": it was" not in page  # the held-out rows that evals.jsonl has


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert (
        result.output
        == f"thinwire: {tmp_path}: holds no run (a folder with run.toml and rounds.jsonl or evals.jsonl)\n"
    )
