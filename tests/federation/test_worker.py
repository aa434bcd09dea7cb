"""A worker as a process: its socket, the time that it has, and what it leaves when it is ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

import msgpack
from silos import Silos
from tiny import tiny_rows, write_jsonl

from thinwire import assemble, wire
from thinwire.errors import ConfigError
from thinwire.federation import channel
from thinwire.federation.fingerprint import fingerprints
from thinwire.federation.policy import task_of
from thinwire.federation.processes import Children, alive
from thinwire.federation.site import Site
from thinwire.federation.site_processes import SiteSide
from thinwire.federation.site_run import run_settings
from thinwire.federation.worker import Worker
from thinwire.runtime.payloads import Hello

THIN: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ input }}"


def test_a_visit_beyond_the_policy_s_seconds_is_ended_whatever_it_is_at(tmp_path: Path) -> None:
    silos = Silos.make(tmp_path, sites=1)
    own = {"template": "jinja", "prompt": ENDLESS, "answer": "{{ output }}", "choices": None}
    run = silos.run(THIN, data=own)
    (tmp_path / "policy.toml").write_text(f'seconds = 2.0\ntemplates = ["{task_of(run.data)}"]')
    data = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(3))
    files = {"policy": str(tmp_path / "policy.toml"), "model": str(silos.folder / "model")}
    site = Site("north", str(data), str(tmp_path / "site"), "", **files)
    side = SiteSide(site, "127.0.0.1:1", tmp_path / "north.key", tmp_path / "ca.crt")
    children, settings = side.children, run_settings(run, ("north",), "0" * 16)
    hello = bytes(wire.encode(Hello(), run=assemble.identity(run), client=0))
    table = {"action": "join", "transfer": "0" * 16, "offset": 0, "total": len(hello), "room": 1, "counted": 0}
    table |= fingerprints(run, assemble.net_of(run))
    try:
        children.start("supernode", ["sleep", "600"])
        children.start("worker", [sys.executable, "-m", "thinwire.federation.worker", side.folder / "site.json"])
        with pytest.raises(channel.Down, match="died at work"):
            channel.ask(Path(side.site.socket), {**table, "settings": settings}, hello, patience=300.0)
        assert children.running["worker"].wait(60) == -signal.SIGALRM
        assert "its worker was at one visit for longer than the policy's seconds" in str(side.tick())
        assert children.running["worker"].poll() is None  # and there is one again
    finally:
        side.stop()
    Worker(site)
    lines = [json.loads(line) for line in (tmp_path / "site" / "audit.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["passed", "ended: no answer was given"]


def sent(*parts: bytes) -> tuple[channel.Table, bytes]:
    """What `receive` makes of these bytes and an end."""
    here, there = socket.socketpair()
    with here, there:

        def send() -> None:
            for part in parts:
                here.sendall(part)
            here.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            return channel.receive(there)
        finally:
            there.close()
            sender.join()


def framed(packed: bytes, body: bytes = b"") -> bytes:
    return len(packed).to_bytes(4, "little") + packed + len(body).to_bytes(8, "little") + body


def test_a_table_and_a_body_come_as_they_were_sent() -> None:
    table, body = {"a": 1, "b": "x" * 100_000, "c": 0.5}, bytes(range(256)) * 90_000
    assert sent(framed(msgpack.packb(table), body)) == (table, body)


@pytest.mark.parametrize(
    "content",
    [
        framed(b"\x91" * 1000),
        framed(b"\xdd\x00\x01\x00\x00" + b"\x90" * 65536),  # a list of 65,536 empty ones
        framed(msgpack.packb({"a": [1]})),
        framed(msgpack.packb({"a": {"b": 1}})),
        framed(msgpack.packb({"a": b"x"})),
        framed(msgpack.packb({"a": None})),
        framed(msgpack.packb({1: "a"})),
        framed(msgpack.packb({str(i): i for i in range(100)})),
        framed(msgpack.packb([1, 2])),
        framed(msgpack.packb(msgpack.ExtType(5, b"x"))),
        framed(b"\x81\xa1a\xa1\xff"),
        framed(b"\xc1"),
        framed(b""),
        framed(msgpack.packb({}) + b"x"),
        (1 << 31).to_bytes(4, "little"),
        b"\x01\x00\x00\x00\x80" + (1 << 62).to_bytes(8, "little"),
        b"\x01\x00\x00\x00\x80" + (1 << 30).to_bytes(8, "little") + b"x",
        b"\x05",
    ],
)
def test_nonsense_at_the_socket_ends_that_connection_and_nothing_else(content: bytes) -> None:
    with pytest.raises(ConnectionError):
        sent(content)


def test_the_socket_s_folder_is_the_site_s_and_is_taken_over(tmp_path: Path) -> None:
    first = channel.folder(tmp_path / "site")
    try:
        assert stat.S_IMODE(first.stat().st_mode) == 0o700
        (first / "worker").write_text("what a killed process left")
        first.chmod(0o755)
        assert channel.folder(tmp_path / "site") == first
        assert stat.S_IMODE(first.stat().st_mode) == 0o700
        assert channel.folder(tmp_path / "other") != first
        assert len(str(first / "worker")) < 100
    finally:
        (first / "worker").unlink()
        first.rmdir()
        channel.folder(tmp_path / "other").rmdir()
    (tmp_path / "mine").mkdir()
    os.symlink(tmp_path / "mine", first)
    try:
        with pytest.raises(ConfigError, match="is not a folder of this user"):
            channel.folder(tmp_path / "site")
    finally:
        first.unlink()


def test_children_are_named_by_their_last_error(tmp_path: Path) -> None:
    children = Children(tmp_path / "flwr", tmp_path / "logs")
    children.start("x", [sys.executable, "-S", "-c", "print('ERROR: old')"]).wait(60)
    children.start("x", [sys.executable, "-S", "-c", "print('INFO: new')"]).wait(60)
    assert children.why("x") == "INFO: new"  # not that of the process before
    children.stop()


RELAY = """
import sys
from pathlib import Path
from types import SimpleNamespace
from thinwire.federation.relay import relay
from thinwire.federation.envelope import pack
message = SimpleNamespace(content=pack(b"x", transfer="0" * 16))
print("ready", flush=True)
relay(message, SimpleNamespace(node_config={"socket": sys.argv[1]}), Path(sys.argv[2]))
"""
PARENT = (
    "import subprocess, sys; c = subprocess.Popen([sys.executable, *sys.argv[1:]]); print(c.pid, flush=True); c.wait()"
)


def test_a_relay_that_waits_for_its_worker_ends_with_flower_s_process(tmp_path: Path) -> None:
    silent = channel.listen(tmp_path / "worker")
    (tmp_path / "site.json").write_text("{}")
    command = [sys.executable, "-c", PARENT, "-c", RELAY, str(tmp_path / "worker"), str(tmp_path / "site.json")]
    with silent, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        relay = int(parent.stdout.readline())
        link, _ = silent.accept()  # it has asked, and waits
        with link:
            assert alive(relay)
            parent.kill()
            until = time.monotonic() + 60
            while alive(relay):
                assert time.monotonic() < until
                time.sleep(0.1)
