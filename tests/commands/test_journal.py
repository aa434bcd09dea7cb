"""Logs as JSON: an object a line, each with its run, round and site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from test_cli import OWN, thinwire
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire import assemble, config
from thinwire.commands.journal import Journal, current, journal
from thinwire.commands.terminal import Stopped, echo, one_line, show_command


def objects(text: str) -> list[dict[str, Any]]:
    """Each line, which is an object with all the fields that each has."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "event", "message", "run", "name", "round", "site"} <= set(each) for each in found)
    return found


def test_a_run_s_lines_are_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny_folder(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(12))
    file = tmp_path / "run.toml"
    file.write_text(
        f'name = "logged"\nrounds = 2\n[model]\npath = "{tmp_path / "model"}"\n[data]\npath = "{rows}"\nclients = 2\n'
        'max_length = 128\n[method]\npath = "counting:Counting"\n'
    )
    out = tmp_path / "out"
    result = thinwire("run", file, "--out", out, "--log", "json")
    assert (result.code, result.err) == (0, "")
    lines = objects(result.out)
    assert {line["run"] for line in lines} == {f"{assemble.identity(config.load(file)):08x}"}
    assert {line["name"] for line in lines} == {"logged"}
    assert [(line["round"], line["replies"]) for line in lines if line["event"] == "round"] == [(1, 2), (2, 2)]
    assert {line["round"] for line in lines if line["event"] == "evaluation"} == {0, 2}
    assert [line["rounds"] for line in lines if line["event"] == "ended"] == [2]
    monkeypatch.setenv("THINWIRE_LOG", "json")
    again = thinwire("run", file, "--out", out, "--resume")
    assert [line["event"] for line in objects(again.out)] == ["note", "ended"]
    wrong = thinwire("run", file, "--out", out)
    assert wrong.code == 2
    [line] = objects(wrong.err)
    assert (line["level"], line["event"]) == ("error", "stopped")
    assert "already holds a run" in line["message"]
    monkeypatch.delenv("THINWIRE_LOG")
    assert thinwire("run", file, "--out", out, "--resume").out.startswith(f"{out}: this run is complete")


def test_another_form_is_refused() -> None:
    result = thinwire("run", "run.toml", "--log", "xml")
    assert result.code == 2
    assert "'xml' is none of text, json" in result.err


def test_what_was_dropped_and_what_a_site_s_log_has(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Journal()
    late = {"id": 1, "name": "south\x1b", "error": "late: no reply"}
    lines.record("rounds.jsonl", {"round": 3, "clients": [{"id": 0, "name": "north"}, late], "metrics": {}})
    lines.record("evals.jsonl", {"round": 3, "split": "heldout", "loss": float("inf"), "samples": [{"prompt": "x"}]})
    round, dropped, evaluation = objects(capsys.readouterr().out)
    assert (round["replies"], round["dropped"], round["round"]) == (1, 1, 3)
    assert (dropped["site"], dropped["level"], dropped["reason"]) == ("south\x1b", "warning", "late: no reply")
    assert evaluation["loss"] is None
    assert "samples" not in evaluation
    lines.about["site"] = "north"
    entry = {"direction": "in", "action": "train", "run": 7, "round": 4, "bytes": 10, "verdict": "refused: no"}
    lines.frames([json.dumps(entry), "{"])
    lines.add("note", "then")
    frame, then = objects(capsys.readouterr().out)
    assert (frame["run"], frame["round"], frame["site"], frame["level"]) == ("00000007", 4, "north", "warning")
    assert (then["run"], then["round"]) == ("00000007", 4)


def test_all_that_is_printed_is_in_it_and_text_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with journal("json"):
        echo("a\nb")
        show_command(["x", "y z"])
        with pytest.raises(typer.Exit), one_line():
            raise Stopped("no more")
    printed = capsys.readouterr()
    assert [line["message"] for line in objects(printed.out)] == ["a\nb", "$ x 'y z'"]
    assert [line["message"] for line in objects(printed.err)] == ["no more"]
    assert current() is None
    echo("a")
    assert capsys.readouterr().out == "a\n"
