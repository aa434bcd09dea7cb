"""The proxy lets the fleet's paths through and nothing else, and the hub refuses who has no key."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from silos import Silos

from thinwire.federation import keys, proxy
from thinwire.federation.processes import Children, free_port
from thinwire.federation.site import Site
from thinwire.federation.site_processes import SiteSide
from thinwire.federation.superlink import ServerSide

BARRED = [
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet//../control/start-run",
    "//v1/control/start-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/docs",
    "/openapi.json",
    "/health",
    "/",
]


def post(port: int, path: str, ca: Path) -> int:
    """The status of a bare request."""
    context = ssl.create_default_context(cafile=str(ca))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
    connection.request("POST", path, body=b"", headers={"Content-Type": "application/x-protobuf"})
    return connection.getresponse().status


def until(done: Any, seconds: float = 120.0) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_the_files_say_what_is_let_through(tmp_path: Path) -> None:
    files = proxy.write(tmp_path / "proxy", tmp_path, "0.0.0.0", 8443, 9000)
    nginx, caddy = files["nginx"].read_text(), files["caddy"].read_text()
    assert nginx.count("proxy_pass") == caddy.count("reverse_proxy") == 1
    assert "https://127.0.0.1:9000$uri" in nginx
    assert "listen 0.0.0.0:8443 ssl" in nginx
    assert "location / { return 403; }" in nginx


@pytest.mark.long
def test_control_paths_are_refused_through_the_proxy_and_strangers_by_the_hub(tmp_path: Path) -> None:
    command = proxy.command(tmp_path / "proxy")
    if command is None or "nginx" not in command[0]:
        pytest.skip("nginx is not installed")
    secrets = tmp_path / "keys"
    keys.make_server([], secrets)
    for name in ("north", "south", "stranger"):
        pub = keys.make_site(name, tmp_path)
        if name != "stranger":
            keys.register(name, pub, secrets)
    other = tmp_path / "other"
    keys.make_server([], other)
    side, port = ServerSide(tmp_path / "hub", secrets, ("north", "south")), free_port()
    proxy.write(tmp_path / "proxy", secrets, "127.0.0.1", port, side.port)
    front = Children(tmp_path / "flwr", tmp_path / "logs")
    (tmp_path / "silos").mkdir()
    Silos.make(tmp_path / "silos")
    sites: dict[str, SiteSide] = {}
    try:
        side.start()
        front.start("proxy", command)
        until(lambda: _listens(port, secrets / "ca.crt"))
        # what the hub itself would have answered is not 403
        assert post(side.port, "/v1/control/list-runs", side.ca) not in (401, 403, 404)
        for path in BARRED:
            assert post(port, path, side.ca) in (400, 403), path
        assert post(port, "/v1/fleet/pull-messages", side.ca) == post(side.port, "/v1/fleet/pull-messages", side.ca)
        for name, ca in (("north", side.ca), ("stranger", side.ca), ("south", other / "ca.crt")):
            data = tmp_path / "silos" / "data" / "north.jsonl"
            site = Site(name, str(data), str(tmp_path / "at" / name), "")
            sites[name] = SiteSide(site, f"127.0.0.1:{port}", tmp_path / f"{name}.key", ca)
            sites[name].start()
        log = tmp_path / "hub" / "logs" / "superlink.log"
        until(lambda: "Activated node_id" in log.read_text())
        until(lambda: sites["stranger"].children.running["supernode"].poll() is not None)
        until(
            lambda: (
                "CERTIFICATE_VERIFY_FAILED" in (sites["south"].children.logs / "supernode.log").read_text()
                or "certificate verify failed" in (sites["south"].children.logs / "supernode.log").read_text()
                or sites["south"].children.running["supernode"].poll() is not None
            )
        )
        found = json.loads(side._flwr("supernode", "list", "hub", "--format", "json"))
        online = [node for node in found["nodes"] if node["status"] == "online"]
        assert len(online) == 1
        assert len(found["nodes"]) == 2
    finally:
        for site in sites.values():
            site.stop()
        front.stop()
        side.stop()


def _listens(port: int, ca: Path) -> bool:
    try:
        return post(port, "/", ca) == 403
    except OSError:
        return False


def test_nginx_takes_the_configuration(tmp_path: Path) -> None:
    command = proxy.command(tmp_path / "proxy")
    if command is None or "nginx" not in command[0]:
        pytest.skip("nginx is not installed")
    keys.make_server([], tmp_path)
    proxy.write(tmp_path / "proxy", tmp_path, "127.0.0.1", free_port(), 9000)
    done = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
