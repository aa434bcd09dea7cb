"""A run's folder is one process's at a time, and the lock is gone with that process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from thinwire.errors import ConfigError
from thinwire.runtime.folder import FILE, locked

HOLD = "import sys; from pathlib import Path; from thinwire.runtime.folder import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the folder until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_at_work_is_refused_with_the_process_that_has_it(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(ConfigError, match=rf"another process \(pid {process.pid}\) is at work here"), locked(tmp_path):
        pass
    process.communicate("")
    with locked(tmp_path):
        pass


def test_a_lock_does_not_outlive_a_process_that_was_killed(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / FILE).exists()  # nobody was there to remove it
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_children_of_the_holder_do_not_have_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    with locked(tmp_path):
        pass
    child.kill()
    child.wait()


def test_a_folder_that_was_made_for_nothing_goes_and_what_is_in_one_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), locked(tmp_path / "a" / "b"):
        raise ValueError("mine")
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
