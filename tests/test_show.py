"""What a person reads: sizes, times, ratios, and the summary of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Column, Table
from rich.text import Text

from thinwire import config
from thinwire.assemble import Rows
from thinwire.commands import methods
from thinwire.commands.screen import Screen
from thinwire.commands.show import Live, print_scores, print_summary
from thinwire.data.rows import Row
from thinwire.data.shown import printable
from thinwire.units import number, share, size, span


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (999.7, "1.0 kB"),
        (1000, "1.0 kB"),
        (18_250, "18.2 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (538_060_032, "538.1 MB"),
        (2_500_000_000, "2.5 GB"),
        (7.25e15, "7250.0 TB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_span(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (26_880, "26.9 k"), (134_515_008, "134.5 M"), (7e9, "7.0 G")])
def test_number(count: float, text: str) -> None:
    assert number(count) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (100, 823_100, "1/8,231"),
        (100, 1000, "1/10"),
        (100, 390, "1/3.9"),
        (100, 110, "1/1.1"),
        (100, 100, "1/1"),
        (107_900, 107_520, "1/1"),
        (200, 100, "2.0/1"),
        (0, 100, "-"),
        (100, 0, "-"),
    ],
)
def test_share(part: float, whole: float, text: str) -> None:
    assert share(part, whole) == text


SCORE = {"loss": 1.0, "perplexity": 2.7, "accuracy": None, "rouge_l": 0.25, "bleu": 12.5}


def run_folder(folder: Path, *, splits: bool = True, answer: str = "great") -> Path:
    """The records of a run of one round, of two clients of which one was dropped."""
    samples = [{"prompt": "a [bold]sentence[/bold] :smile:", "expected": "great", "answer": answer}]
    score = {
        "split": "heldout",
        "loss": 1.25,
        "perplexity": 3.5,
        "accuracy": 0.5,
        "rouge_l": None,
        "bleu": None,
        "samples": samples,
    }
    totals = {"bytes_down": 400, "bytes_up": 100, "seconds": 61.0, "peak_memory_bytes": 2e8, "model_bytes": 100_000}
    evals = {"first": [score] if splits else [], "final": [score | {"loss": 1.0}] if splits else []}
    clients = [{"id": 0, "bytes_down": 200, "bytes_up": 100}, {"id": 1, "bytes_down": 200, "bytes_up": 0, "error": "x"}]
    (folder / "summary.json").write_text(json.dumps({"rounds": 1, **totals, **evals}))
    (folder / "rounds.jsonl").write_text(json.dumps({"round": 1, "clients": clients}) + "\n")
    return folder


def test_the_summary_says_before_and_after_and_what_was_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(run_folder(tmp_path))
    out = capsys.readouterr().out
    lines = [" ".join(line.replace("│", " ").split()) for line in out.splitlines()]
    assert "heldout loss 1.250 1.000" in lines
    assert "heldout accuracy 0.500 0.500" in lines
    assert "down 200 100,000 1/500" in lines
    assert "up 100 100,000 1/1,000" in lines  # the mean of the replies that came
    assert "a [bold]sentence[/bold] :smile:" in lines  # data is no markup
    assert "before: great | after: great | expected: great" in lines
    assert "1 round in 1 min 01 s, peak memory 200.0 MB; in all 400 B down, 100 B up" in lines
    assert lines[-1] == f"the model is in {tmp_path / 'model'}"  # in one line, however long
    assert all(len(line) <= 80 for line in out.splitlines()[:-1])


def test_a_run_names_the_clients_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {f"silo-{i}": [Row({"output": "x"}, "x", 1)] for i in range(52)}
    net: Any = SimpleNamespace(size=10)
    for partition, line in (("files", ": silo-0, silo-1, "), ("iid", "")):
        tree = {"data": {"path": "silos", "partition": partition}, "method": {"name": "fedavg"}}
        Live(config.parse(tree, "x"), Rows(held, {}), net, tmp_path)
        (found,) = (text for text in capsys.readouterr().out.splitlines() if "stay where they are" in text)
        assert found.startswith(f"  52 rows stay where they are, with 52 clients{line}")
        assert found.endswith("silo-49 and 2 more" if partition == "files" else "clients")


OTHERS = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\b\r[link=http://x]"


def test_others_text_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(run_folder(tmp_path, answer=OTHERS))
    print_scores([{**SCORE, "split": OTHERS, "rows": 1}])
    out = capsys.readouterr().out
    assert printable(out) == out
    assert "before: \\x1b[2J\\x1b]0;title\\x07" in out
    assert "[link=http://x]" in out


def test_a_screen_escapes_whatever_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(OTHERS, Column(Text(OTHERS)))
    table.add_row(OTHERS, Text(OTHERS))
    screen = Screen()
    for given in (OTHERS, Text(OTHERS), table):
        screen.print(given)
    out = capsys.readouterr().out
    assert printable(out) == out
    borders = {line.rstrip()[-1] for line in out.splitlines() if line.startswith(("│", "┃"))}
    assert borders == {"│", "┃"}


def test_a_long_answer_has_lines_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(run_folder(tmp_path, answer="word " * 30))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "expected: great" in lines
    assert next(line for line in lines if line.startswith("before: word")).endswith("...")


def test_a_run_without_held_out_rows_has_no_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(run_folder(tmp_path, splits=False))
    out = capsys.readouterr().out
    assert "before" not in out
    assert "1/500" in out


def test_scores_and_methods_are_lines_of_any_length(capsys: pytest.CaptureFixture[str]) -> None:
    score = {"split": "data", "loss": 1.0, "perplexity": 2.7, "accuracy": None, "rouge_l": 0.25, "bleu": 12.5}
    print_scores([score | {"rows": 1}])
    assert capsys.readouterr().out == "data: loss 1.0000, perplexity 2.700, Rouge-L 0.250, BLEU 12.5 (1 row)\n"
    fields = {"order": {"type": "a" * 90, "default": [1]}, "lr": {"type": "float | None", "default": None}}
    methods.show({"own": {"about": "b" * 90, "paper": "", "fields": fields}})
    out = capsys.readouterr().out
    assert f"own: {'b' * 90}\n" in out
    assert f"  order = [1]  ({'a' * 90})\n" in out
    assert "  lr = null  (float | None)\n" in out


def test_a_split_that_is_there_at_one_end_alone_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A site that is gone at the end, one that came later, and a loss that was no number."""
    folder = run_folder(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    summary["first"].append({"split": "sites_train", "loss": 2.5, "accuracy": None, "samples": []})
    summary["final"].append({"split": "sites", "loss": 0.75, "accuracy": None, "samples": []})
    summary["first"][0]["loss"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    print_summary(folder)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "loss" in line and "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["heldout loss", "", "1.000"],
        ["sites_train loss", "2.500", ""],
        ["sites loss", "", "0.750"],
    ]
