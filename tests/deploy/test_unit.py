"""The unit of a confined client, by systemd's own checks where systemd is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thinwire.cli import app

UNIT = Path(__file__).parent.parent.parent / "deploy" / "thinwire-client.service"


def analyze(*words: str | Path) -> str:
    """What systemd-analyze prints, or the test is skipped."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    done = subprocess.run(["systemd-analyze", *map(str, words)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "thinwire"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/thinwire/bin/thinwire", str(program)))
    assert analyze("verify", unit) == ""
    unit.write_text(unit.read_text().replace("NoNewPrivileges", "NoNewPrivilege"))
    assert "NoNewPrivilege" in analyze("verify", unit)  # so that the line above says something


def test_systemd_finds_little_exposed() -> None:
    printed = analyze("security", "--offline=true", UNIT)
    if "Overall exposure level" not in printed:
        pytest.skip("this systemd cannot look at a file")
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", printed)
    assert level
    assert float(level[1]) < 3.5


def test_its_command_is_one_of_ours_and_confined() -> None:
    command = re.search(r"^ExecStart=(.*(?:\\\n.*)*)", UNIT.read_text(), re.MULTILINE)
    assert command
    words = command[1].replace("\\\n", " ").split()
    assert words[:3] == ["/opt/thinwire/bin/thinwire", "client", "--confine"]
    help = CliRunner().invoke(app, ["client", "--help"]).output
    assert [word for word in words if word.startswith("--") and word not in help] == []
