"""A hub that ships code of its own to a confined site: what that code reads and reaches, beside a site in the open."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from bubblewrap import sandbox
from silos import Silos, audited, in_process, state_of

from thinwire.federation.local import Local, named
from thinwire.federation.site_processes import SiteSide

THIN: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}
# What a hostile hub ships in place of thinwire's app. Each site tries what it is asked; the answers go to found.json.
HOSTILE = """
import json, os, socket, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

ASKED = json.loads({asked!r})
server = ServerApp()
client = ClientApp()

@server.main()
def run(grid, context):
    folder = Path(str(context.run_config["folder"]))
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    content = RecordDict({{"x": ConfigRecord({{"x": 1}})}})
    sent = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
    found = {{}}
    for reply in grid.send_and_receive(sent, timeout=300):
        found |= json.loads(reply.content["found"]["text"]) if reply.has_content() else {{"error": str(reply.error)}}
    (folder / "found.json").write_text(json.dumps(found))
    status = {{"pid": os.getpid(), "state": "done", "error": None}}
    (folder / "federation" / "status.json").write_text(json.dumps(status))

def tried(action, *args):
    try:
        return str(action(*args))
    except Exception as error:
        return type(error).__name__

def read(path):
    return len(Path(path).read_bytes())

def write(path, name):
    with Path(path).open("a") as file:
        return file.write(name)

def reach(port, target=None):
    link = socket.create_connection(("127.0.0.1", port), 5)
    if target:
        link.sendall(f"CONNECT 127.0.0.1:{{target}} HTTP/1.1\\r\\n\\r\\n".encode())
        return link.recv(12).decode()
    return "connected"

def around(target):
    return reach(int(os.environ["HTTPS_PROXY"].rsplit(":", 1)[1]), target)

def abstract(name):
    socket.socket(socket.AF_UNIX).connect(chr(0) + name)
    return "connected"

@client.train()
def visit(message, context):
    name = str(context.node_config["name"])
    found = {{f"read {{path}}": tried(read, path) for path in ASKED["read"]}}
    found |= {{f"write {{path}}": tried(write, path, name) for path in ASKED["write"]}}
    found |= {{f"port {{port}}": tried(reach, port) for port in ASKED["ports"]}}
    found |= {{f"around {{port}}": tried(around, port) for port in ASKED["ports"]}}
    found |= {{f"abstract {{name}}": tried(abstract, name) for name in ASKED["abstract"]}}
    found |= {{f"signal {{pid}}": tried(os.kill, pid, 0) for pid in ASKED["pids"]}}
    content = RecordDict({{"found": ConfigRecord({{"text": json.dumps({{name: found}})}})}})
    return Message(content, reply_to=message)
"""


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"), sites=2)


@pytest.fixture
def outside() -> Iterator[tuple[int, str]]:
    """What a site's machine may reach and confined code may not: a port, and an abstract socket."""
    name = f"thinwire-outside-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0), backlog=16) as port, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + name)
        unix.listen(16)
        yield port.getsockname()[1], name


def confine(local: Local, silos: Silos, name: str) -> SiteSide:
    """The site in sandboxes, in place of the one in the open."""
    side = local.sites[name]
    site = replace(side.site, model=str(silos.folder / "model"), allow_model=False)
    address = f"127.0.0.1:{local.server.port}"
    local.sites[name] = SiteSide(site, address, side.key, side.ca, confine=sandbox())
    return local.sites[name]


@pytest.mark.long
def test_a_federation_of_confined_sites_has_the_same_bytes_and_the_same_state(
    silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox()
    run = silos.run(THIN)
    frames = in_process(silos, run, tmp_path / "here", monkeypatch)
    silos.begin(run, tmp_path / "there")
    rows = silos.rows(run)
    local = Local(tmp_path / "federation", named(run, rows.clients))
    for name in local.names:
        confine(local, silos, name)
    try:
        local.start()
        local.follow(tmp_path / "there", run, rows.splits)
    finally:
        local.stop()
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")
    assert audited(local, run) == frames


def test_code_of_a_hostile_hub_reads_nothing_of_the_site_and_reaches_the_hub_alone(
    silos: Silos, tmp_path: Path, outside: tuple[int, str]
) -> None:
    sandbox()
    run = silos.run(THIN)
    rows = silos.rows(run)
    (tmp_path / "hub").mkdir()
    local = Local(tmp_path / "federation", named(run, rows.clients))
    secret = tmp_path / "records.txt"
    secret.write_text("of patients")
    north, south = local.names
    side = confine(local, silos, north)
    files = [secret, silos.folder / "model" / "config.json", "/etc/passwd", __file__]
    for name in local.names:
        place = local.place(name)
        files += [local.sites[name].site.data, place / "policy.toml", place / "site.json"]
    written = [secret, *(local.place(name) / "audit.jsonl" for name in local.names), side.ca]
    port, abstract = outside
    asked = {"read": files, "write": written, "ports": [port, local.server.port], "abstract": [abstract]}
    asked["pids"] = [os.getpid()]
    local.server.prepare(tmp_path / "hub", run, {})
    app = tmp_path / "hub" / "federation" / "app" / "thinwire_app.py"
    app.write_text(HOSTILE.format(asked=json.dumps(asked, default=str)))
    try:
        for name in local.names:
            (local.place(name) / "audit.jsonl").touch()
        local.start()
        local.server.follow(tmp_path / "hub", lambda: [each.tick() for each in local.sites.values()] and None)
    finally:
        local.stop()
    found = json.loads((tmp_path / "hub" / "found.json").read_text())
    assert set(found) == {north, south}
    for what, result in found[south].items():  # in the open all of it succeeds, so it would here
        assert result in ("connected", "None") or result.isdecimal() or what.startswith("around"), what
    assert {result for what, result in found[north].items() if what.startswith("read")} == {"FileNotFoundError"}
    for file in written:  # what it may write is its own
        assert "south" in file.read_text()
        assert "north" not in file.read_text()
    assert found[north][f"write {side.ca}"] == "OSError"  # it is there to be read
    reached = {result for what, result in found[north].items() if what.startswith(("port", "abstract"))}
    assert reached == {"ConnectionRefusedError"}
    assert found[north][f"around {port}"] == "HTTP/1.1 403"
    assert found[north][f"around {local.server.port}"] == "HTTP/1.1 200"  # the hub, which it has come from
    assert found[north][f"signal {os.getpid()}"] == "ProcessLookupError"
