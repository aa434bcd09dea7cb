"""What operators read where a federation does not come about: one line that has the reason, before anything starts."""

from __future__ import annotations

import datetime
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from test_cli import refused
from tiny import tiny_rows, write_jsonl

from thinwire.errors import ConfigError
from thinwire.federation import attended, keys, proxy
from thinwire.federation.follower import Ended
from thinwire.federation.processes import Children, last_error
from thinwire.federation.reach import Away, greet, listening
from thinwire.federation.site import Site
from thinwire.federation.site_processes import SiteSide
from thinwire.federation.superlink import ServerSide


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The keys of a server that sites reach as localhost."""
    keys.make_server([], tmp_path / "keys")
    return tmp_path / "keys"


@contextmanager
def answering(home: Path | None, sends: bytes = b"") -> Iterator[int]:
    """A port that answers with the certificate in a folder, or with some bytes and no TLS."""
    server = socket.create_server(("127.0.0.1", 0))
    context = None
    if home is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(home / "server.crt", home / "server.key")

    def serve() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            with link:
                try:
                    if context is not None:
                        context.wrap_socket(link, server_side=True).close()
                    else:
                        link.recv(1)
                        link.sendall(sends)
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def expired(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make server.crt anew, as it would be made three years ago."""

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Then:
            return cls.fromtimestamp(time.time() - 3 * 365 * 86400, tz)

    with monkeypatch.context() as patch:
        patch.setattr(keys.datetime, "datetime", Then)
        keys.make_server([], home)


def test_a_handshake_names_who_does_not_fit(home: Path, tmp_path: Path) -> None:
    keys.make_server([], tmp_path / "other")
    with answering(home) as port:
        greet(f"localhost:{port}", home / "ca.crt")
        with pytest.raises(
            ConfigError, match=r"--ca: the certificate of localhost:\d+ is not of the authority in .*other"
        ):
            greet(f"localhost:{port}", tmp_path / "other" / "ca.crt")
    (tmp_path / "none.crt").write_text("-")
    with pytest.raises(ConfigError, match=r"none.crt holds no certificate"):
        greet("localhost:1", tmp_path / "none.crt")


def test_a_certificate_for_another_host(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.create_connection
    with answering(home) as port:
        monkeypatch.setattr(socket, "create_connection", lambda place, wait: real(("127.0.0.1", port), wait))
        for host in ("hub.example", "192.0.2.7"):
            with pytest.raises(
                ConfigError, match=rf"for other names than {host}; there: thinwire keys server --host {host}"
            ):
                greet(f"{host}:{port}", home / "ca.crt")


def test_a_certificate_that_has_expired(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expired(home, monkeypatch)
    with answering(home) as port, pytest.raises(Away, match=r"is not valid now \(certificate has expired\)"):
        greet(f"localhost:{port}", home / "ca.crt")
    keys.register("north", keys.make_site("north", tmp_path), home)
    with pytest.raises(
        ConfigError, match=r"server.crt: has expired on \d{4}-\d\d-\d\d; make another with: thinwire keys"
    ):
        ServerSide(tmp_path / "hub", home, ("north",))
    assert not (tmp_path / "hub").exists()


def test_a_server_s_own_files_are_checked(home: Path, tmp_path: Path) -> None:
    keys.check_server(home)
    keys.make_server([], tmp_path / "other")
    mine = (home / "server.key").read_bytes()
    (home / "server.key").write_bytes((tmp_path / "other" / "server.key").read_bytes())
    with pytest.raises(ConfigError, match=r"server.key: is not the key of server.crt"):
        keys.check_server(home)
    (home / "server.key").write_bytes(mine)
    (home / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(ConfigError, match=r"server.crt: is not of the authority in ca.crt"):
        keys.check_server(home)
    (home / "ca.crt").write_text("-")
    with pytest.raises(ConfigError, match="its certificates cannot be read"):
        keys.check_server(home)


@pytest.mark.parametrize("sends", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b""])
def test_a_port_that_speaks_no_tls(sends: bytes, home: Path) -> None:
    with answering(None, sends) as port, pytest.raises((ConfigError, Away)) as wrong:
        greet(f"localhost:{port}", home / "ca.crt")
    assert f"localhost:{port}" in str(wrong.value)
    assert "speaks no TLS" in str(wrong.value) or "cannot be reached" in str(wrong.value)
    # nothing came: so ends a connection what stands before a hub that is away, and is back later
    assert isinstance(wrong.value, Away) or sends


def test_a_port_at_which_nobody_listens_and_a_name_of_nobody(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Away, match=rf"nothing listens at localhost:{port} \(connection refused\)"):
        greet(f"localhost:{port}", home / "ca.crt")

    def nobody(number: int) -> None:
        def look(*_: object) -> None:
            raise socket.gaierror(number, "no")

        monkeypatch.setattr(socket, "create_connection", look)

    nobody(socket.EAI_NONAME)
    with pytest.raises(ConfigError, match=r"there is no host nowhere\.invalid"):
        greet("nowhere.invalid:8443", home / "ca.crt")
    nobody(socket.EAI_AGAIN)
    with pytest.raises(Away, match="cannot be looked up now"):
        greet("nowhere.invalid:8443", home / "ca.crt")


def test_a_port_that_is_taken_is_reported_before_anything_starts(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data]\npath = "own"\n[method]\nname = "fedkseed"\n[federation]\nsites = ["north"]\n')
    keys.register("north", keys.make_site("north", tmp_path), home)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ("--keys", home, "--out", tmp_path / "out")
        line = f"--listen: 127.0.0.1:{port} is in use by another program"
        assert refused("server", file, *options, "--listen", f"127.0.0.1:{port}", "--expose-control-api") == line
        if proxy.command(tmp_path) is not None:
            assert refused("server", file, *options, "--listen", f"127.0.0.1:{port}") == line
            assert refused("server", file, *options, "--listen", "127.0.0.1:0").startswith("--listen: ")
            busy = refused("server", file, *options, "--listen", f"127.0.0.1:{free()}", "--hub-port", str(port))
            assert busy == f"--hub-port: 127.0.0.1:{port} is in use by another program"
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77:8443 is no address of this machine"):
        listening("192.0.2.77", 8443, "--listen")


def free() -> int:
    """A port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_client_names_who_is_wrong_before_it_reads_rows(home: Path, tmp_path: Path) -> None:
    keys.make_site("north", tmp_path)
    keys.make_server([], tmp_path / "other")
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(3))
    options = ["--data", str(rows), "--key", str(tmp_path / "north.key"), "--folder", str(tmp_path / "site")]
    with answering(home) as port:
        bad = ["--server", f"localhost:{port}", "--ca", str(tmp_path / "other" / "ca.crt"), "--model", "m"]
        assert refused("client", *options, *bad).startswith("--ca: the certificate of localhost:")
        good = ["--server", f"localhost:{port}", "--ca", str(home / "ca.crt")]
        assert refused("client", *options, *good).startswith("--model: missing; or --allow-model takes the one")
    assert (
        refused("client", *options, "--server", "hub", "--ca", str(home / "ca.crt"))
        == "--server: 'hub' is not HOST:PORT"
    )
    assert not (tmp_path / "site").exists()


FLOWER = """\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode
INFO:     Started server process [15224]
\x1b[91mERROR \x1b[0m:     Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: 2004] Failed to activate SuperNode.

For more information, visit: <https://flower.ai/docs/305.html>
INFO:     Shutting down
INFO:     Finished server process [15224]
"""
NGINX = (
    "2026/11/29 [notice] 1#1: x\n2026/11/29 [emerg] 7#7: bind() to 127.0.0.1:1 failed (98: Address already in use)\n"
)
PYTHON = (
    "Traceback (most recent call last):\n  File x\nValueError: no such thing\nINFO:     Finished server process [1]\n"
)


@pytest.mark.parametrize(
    ("printed", "line"),
    [
        (
            FLOWER,
            "Exit Code: 305 Failed to initialize the connection to the SuperLink. [code: 2004] Failed to activate",
        ),
        (NGINX, "2026/11/29 [emerg] 7#7: bind() to 127.0.0.1:1 failed (98: Address already in use)"),
        (PYTHON, "ValueError: no such thing"),
        ("INFO: a\nINFO: b\n", "INFO: b"),
        ("", "it printed nothing"),
    ],
)
def test_the_last_error_is_what_counts(printed: str, line: str) -> None:
    assert last_error(printed).startswith(line)
    assert "\n" not in last_error(printed)


def test_a_node_that_ends_gives_its_reason_in_words(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.make_site("north", tmp_path)
    data = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(3))

    def line_of(printed: str, port: int, ca: Path) -> str:
        with monkeypatch.context() as patch:
            one = Site("north", str(data), str(tmp_path / "site"), "")
            side = SiteSide(one, f"localhost:{port}", tmp_path / "north.key", ca)
            print_it = [sys.executable, "-c", "import sys; sys.stdout.write(sys.argv[1])", printed]
            side.children.start("worker", ["sleep", "60"])
            side.children.start("supernode", print_it)
            try:
                side.children.running["supernode"].wait(60)
                patch.setattr(attended, "FIRST", 3.0)
                return str(side.tick())
            finally:
                side.stop()

    with answering(home) as port:
        assert "the server does not take this site's key: it is not registered" in line_of(
            FLOWER, port, home / "ca.crt"
        )
        assert "its node has ended: ValueError: no such thing; again in" in line_of(PYTHON, port, home / "ca.crt")
        keys.make_server([], tmp_path / "other")
        assert "is not of the authority in" in line_of(FLOWER, port, tmp_path / "other" / "ca.crt")
    assert "nothing listens at" in line_of(FLOWER, port, home / "ca.crt")


def test_a_node_that_has_given_up_and_stays_is_started_again(home: Path, tmp_path: Path) -> None:
    """After a handshake that failed Flower's node makes no further try: so where a proxy is there before its hub is."""
    keys.make_site("north", tmp_path)
    data = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(3))
    side = SiteSide(Site("north", str(data), str(tmp_path / "site"), ""), "127.0.0.1:1", tmp_path / "north.key", home)
    code = "import time; print('ERROR :     SSL/TLS handshake error detected.', flush=True); time.sleep(600)"
    try:
        side.children.start("worker", ["sleep", "600"])
        node = side.children.start("supernode", [sys.executable, "-S", "-c", code])
        until, line = time.monotonic() + 60, side.tick()
        while line is None and time.monotonic() < until:
            time.sleep(0.1)
            line = side.tick()
        assert node.poll() == -signal.SIGKILL
        assert "its node has ended" in str(line)
    finally:
        side.stop()


def test_a_proxy_that_does_not_stay_up_ends_the_server_with_its_words(tmp_path: Path) -> None:
    children = Children(tmp_path / "flwr", tmp_path / "logs")
    front = proxy.Front(children, [sys.executable, "-S", "-c", "print('nginx: [emerg] no such file'); print('bye')"])
    front.start()

    def dies() -> str | None:
        children.running["proxy"].wait(60)
        front.began = time.monotonic()  # however long this machine has taken
        return front.tick()

    assert dies() == "the proxy has ended, and is started again: nginx: [emerg] no such file"
    with pytest.raises(Ended, match=r"the proxy does not stay up: nginx: \[emerg\] no such file"):
        dies()
    children.stop()


def test_paths_with_spaces_are_quoted_and_others_refused(home: Path, tmp_path: Path) -> None:
    import subprocess

    place = tmp_path / "a run; of (mine)" / "proxy"
    spaced = tmp_path / "my keys"
    keys.make_server([], spaced)
    files = proxy.write(place, spaced, "127.0.0.1", free(), 9000)
    assert f'"{spaced}/server.crt" "{spaced}/server.key"' in files["caddy"].read_text()
    command = proxy.command(place)
    if command is not None and "nginx" in command[0]:
        done = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for mark in '"$\\':
        with pytest.raises(ConfigError, match="nginx and caddy take no path with one of"):
            proxy.write(tmp_path / f"x{mark}", spaced, "127.0.0.1", 1, 2)
