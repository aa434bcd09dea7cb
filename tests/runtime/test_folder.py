"""A folder is one process's: another is refused by name, and a killed one leaves nothing that bars the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from thinwire.config import ConfigError
from thinwire.runtime.folder import locked

HOLD = (
    "import sys, pathlib, subprocess\nfrom thinwire.runtime.folder import locked\n"
    "with locked(pathlib.Path(sys.argv[1])):\n"
    "    child = subprocess.Popen(['sleep', '60'])\n    print(child.pid, flush=True)\n    sys.stdin.read()\n"
)


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with (
            pytest.raises(ConfigError, match=rf"run: another process \(pid {holder.pid}\) is at work here"),
            locked(folder),
        ):
            pass
        holder.kill()
        holder.wait()
        with locked(folder):  # although the killed one's child still lives
            assert (folder / ".lock").read_text() == f"{os.getpid()}\n"
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.wait()


def test_what_ends_well_lets_go(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 // 0
    with locked(tmp_path):
        pass
