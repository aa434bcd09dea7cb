"""What every command prints: errors and warnings in a line each, without control characters."""

from __future__ import annotations

import json
import logging

import pytest
import typer

from thinwire.commands.terminal import Stopped, echo, echo_json, one_line
from thinwire.config import ConfigError
from thinwire.data.errors import DataError
from thinwire.data.shown import printable
from thinwire.errors import RunError
from thinwire.model.errors import ModelError

OTHERS = "\x1b[2J\x07\u202e\x9b\rx\ny"
SHOWN = "\\x1b[2J\\x07\\u202e\\x9b\\rx y"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError(OTHERS), 2),
        (DataError(OTHERS), 2),
        (ModelError(OTHERS), 2),
        (Stopped(OTHERS), 1),
        (RunError(OTHERS), 1),
        (OSError(5, "no such thing", OTHERS), 1),
    ],
)
def test_an_error_that_quotes_others_is_one_plain_line(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, one_line():
        raise error
    assert caught.value.exit_code == status
    before = "no such thing: " if isinstance(error, OSError) else ""
    assert capsys.readouterr() == ("", f"thinwire: {before}{SHOWN}\n")


def test_a_warning_is_a_line_once_and_only_within_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("thinwire")
    with one_line():
        log.warning("%s", OTHERS)
        log.warning("%s", OTHERS)
        log.error("for the log of a run", exc_info=ValueError("x"))
    assert capsys.readouterr() == ("", f"thinwire: {SHOWN}\n")
    assert log.propagate
    assert not log.handlers


def test_what_is_printed_is_escaped_and_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    echo(OTHERS)
    assert capsys.readouterr().out == "\\x1b[2J\\x07\\u202e\\x9b\\rx\ny\n"
    for ascii in (True, False):
        echo_json({OTHERS: "\x7f"}, ascii)
        out = capsys.readouterr().out
        assert json.loads(out) == {OTHERS: "\x7f"}
        assert printable(out) == out


def test_json_for_other_programs_holds_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json([{"loss": float("nan"), "perplexity": float("inf"), "rows": 3}])
    assert json.loads(capsys.readouterr().out) == [{"loss": None, "perplexity": None, "rows": 3}]
