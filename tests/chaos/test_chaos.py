"""The driver of faults: a handful of its trials, what it calls bad, and all of it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent.parent / "chaos.py"

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or not sys.platform.startswith("linux"), reason="its shim needs Linux and a C compiler"
)


def drive(*args: str) -> subprocess.CompletedProcess[str]:
    """The driver as a user runs it."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, str(DRIVER), *args], capture_output=True, text=True, env=env, check=False)


def test_a_handful_of_kills_ends_in_the_same_model() -> None:
    words = "before fedavg,half fedavg,short fedavg,flip fedavg state/round-000003/state.frame state/round-000002"
    result = drive("--methods", "fedavg", "--every", "140", "--jobs", "1", "--only", words)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("killed before a call") and "good  same" in line for line in lines)
    assert any(line.startswith("state.frame, both: flip") and "refused in a line" in line for line in lines)
    assert lines[-1].endswith(", 0 bad")


def test_what_the_driver_calls_another_end() -> None:
    from workshop import LEFT, Result

    one = Result("a", "b", [{"round": 1, "seconds": 1.0, "bytes_up": 5}], [], {"rounds": 1})
    assert one.difference(dataclasses.replace(one, rounds=[{"round": 1, "seconds": 2.0, "bytes_up": 5}])) is None
    assert one.difference(dataclasses.replace(one, sha256="c")) == "another model"
    assert one.difference(dataclasses.replace(one, weights="c")) == "another model"
    more = dataclasses.replace(one, rounds=[{"round": 1, "seconds": 1.0, "bytes_up": 6}])
    assert one.difference(more) == "other records in rounds"
    assert one.difference(more, bytes_differ=True) is None
    assert one.difference(dataclasses.replace(one, rounds=one.rounds * 2)) == "other records in rounds"
    for name in ("run/state/clients/2/.tmpsWtHcT", "run/.model.1a.tmp/config.json", "run/summary.json.part"):
        assert LEFT.search(name), name
    for name in ("run/state/clients/2/000003.safetensors", "run/model/config.json", "run/.lock"):
        assert not LEFT.search(name), name


@pytest.mark.parametrize(("err", "line"), [("thinwire: no room\n", "no room"), ("a\nthinwire: b\n", None), ("", None)])
def test_one_line_is_one_line(err: str, line: str | None) -> None:
    from preloaded import Ended

    assert Ended(1, "", err).line == line
    assert Ended(70, "", err).line is None


@pytest.mark.long
def test_all_that_the_driver_knows() -> None:
    result = drive()
    print(result.stdout)  # noqa: T201 - the table of docs/reliability.md
    assert result.returncode == 0, result.stdout + result.stderr
