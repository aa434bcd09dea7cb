"""The page "From one machine to five silos", every command in its order, on loopback and with a tiny model.

Changed are only the model, the fields that make runs short, hub.example (127.0.0.1 here), and folders: the page's
machines have a folder each.
"""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from test_docs import SHORT, blocks, commands, write_files
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire.federation import proxy
from thinwire.federation.processes import free_port

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent.parent
PAGE = "docs/federation.md"
THINWIRE = [sys.executable, "-m", "thinwire.cli"]
SECONDS = 600.0


def lines_of(command: str) -> list[list[str]]:
    """The page's lines of this command, in words."""
    words = [shlex.split(line, comments=True) for line in commands(PAGE)]
    return [line[1:] for line in words if line[1] == command]


def typed(words: list[str], place: Path) -> str:
    """What a command prints that ends well."""
    done = subprocess.run([*THINWIRE, *words], cwd=place, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, and what it started has gone with it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.wait(120)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the page's first commands are typed."""
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def test_one_machine_in_one_process_and_as_a_federation(model: Path, place: Path) -> None:
    short = [f"model.path={model}", *SHORT, "rounds=3", "method.steps=1"]
    for command in ("run", "local-federation"):
        for line in lines_of(command):
            typed([*line, *short], place)
    alone, local = (json.loads((place / "runs" / name / "summary.json").read_text()) for name in ("alone", "local"))
    assert local["sha256"] == alone["sha256"]
    sizes = [
        [(v["id"], v["bytes_down"], v["bytes_up"]) for line in file.read_text().splitlines() for v in visits(line)]
        for file in (place / "runs" / name / "rounds.jsonl" for name in ("alone", "local"))
    ]
    assert sizes[0] == sizes[1]
    for kind in ("logs", "at"):
        assert any((place / "runs" / "local" / "federation" / kind).iterdir())
    hurt = [visits(line) for line in (place / "runs" / "hurt" / "rounds.jsonl").read_text().splitlines()]
    assert [any("error" in v for v in round) for round in hurt] == [False, True, False]


def visits(line: str) -> list[dict[str, Any]]:
    """A round's clients, of a line of rounds.jsonl."""
    found: list[dict[str, Any]] = json.loads(line)["clients"]
    return found


def test_five_silos(model: Path, tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.mkdir()
    write_files(PAGE, server)
    if not (started := proxy.command(server)) or "nginx" not in started[0]:
        pytest.skip("nginx is not installed")
    names = ["north", "south", "east", "west", "centre"]
    port, policy = free_port(), next(b.text for b in blocks("docs/security.md") if b.note == "file: policy.toml")
    make, site, register = lines_of("keys")
    typed(make, server)
    for i, name in enumerate(names):
        (tmp_path / name).mkdir()
        public = typed([name if word == "north" else word for word in site], tmp_path / name).strip()
        typed([*register[:2], name, public], server)
        (tmp_path / name / "ca.crt").write_bytes((server / "keys" / "ca.crt").read_bytes())
        (tmp_path / name / "policy.toml").write_text(policy)
        write_jsonl(tmp_path / name / "rows.jsonl", tiny_rows(12, i))
    [hub] = lines_of("server")
    hub = [word.replace("0.0.0.0:8443", f"127.0.0.1:{port}") for word in hub]
    fields = [
        f"model.path={model}",
        "rounds=2",
        "method.steps=2",
        "method.seeds=64",
        "data.max_length=512",
        "threads=1",
    ]
    plain, bound = lines_of("client")
    running: list[subprocess.Popen[bytes]] = []
    with open(tmp_path / "said.txt", "wb") as said:

        def start(words: list[str], folder: Path) -> None:
            running.append(subprocess.Popen([*THINWIRE, *words], cwd=folder, stdout=said, stderr=subprocess.STDOUT))

        try:
            start([*hub, *fields], server)
            wait_for(port)
            for name in names:  # one of them with a policy
                line = bound if name == "centre" else plain
                swaps = {"hub.example:8443": f"127.0.0.1:{port}", "keys/north.key": f"keys/{name}.key"}
                line = [swaps.get(word, word) for word in line if word not in ("--model", "/models/smollm2")]
                start([*line, "--model", str(model)], tmp_path / name)
            assert running[0].wait(SECONDS) == 0, (tmp_path / "said.txt").read_text()
        finally:
            for process in reversed(running):
                end(process)
    folder = server / "runs" / "silos"
    rounds = [visits(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert len(rounds) == 2
    assert [v.get("error") for v in rounds[-1]] == [None] * 5, (tmp_path / "said.txt").read_text()
    assert (folder / "model" / "config.json").is_file()
    assert json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])
    for name in names:
        audit = [json.loads(line) for line in (tmp_path / name / "site" / "audit.jsonl").read_text().splitlines()]
        assert {entry["verdict"] for entry in audit} == {"passed"}
    again = [*hub, *fields, "--out", "runs/silos", "--resume"]
    assert "this run is complete" in typed(again, server)


def wait_for(port: int) -> None:
    """Until something listens there."""
    until = time.monotonic() + SECONDS
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        assert time.monotonic() < until
        time.sleep(0.5)
