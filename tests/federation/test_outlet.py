"""The way out of a sandbox leads to the server, whatever is asked for."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from thinwire.federation import outlet
from thinwire.federation.outlet import Outlet


@pytest.fixture
def echoing() -> Iterator[int]:
    """A port that sends back what it receives, and then ends."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            with link:
                while some := link.recv(1 << 16):
                    link.sendall(some)

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def opened(way: Outlet) -> int:
    """The port of a listener that was handed over, as a process inside does it."""
    with way.open() as link:
        words = [sys.executable, "-m", "thinwire.federation.outlet", str(link.fileno())]
        show = [sys.executable, "-c", "import os; print(os.environ['HTTPS_PROXY'])"]
        done = subprocess.run([*words, *show], pass_fds=[link.fileno()], capture_output=True, text=True, check=True)
    return int(done.stdout.strip().removeprefix("http://127.0.0.1:"))


def request(port: int, line: bytes) -> tuple[bytes, socket.socket]:
    """The first line of the answer to a request, and the connection."""
    link = socket.create_connection(("127.0.0.1", port), 20)
    link.sendall(line + b"\r\nHost: any\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        some = link.recv(1)
        if not some:
            break
        answer += some
    return answer.split(b"\r\n")[0], link


def test_bytes_pass_both_ways_until_both_sides_have_ended(echoing: int) -> None:
    way = Outlet("localhost", echoing)
    try:
        answer, link = request(opened(way), b"CONNECT LOCALHOST:%d HTTP/1.1" % echoing)
        assert answer == b"HTTP/1.1 200 Connection established"
        sent = bytes(range(256)) * 5000
        with link:
            writer = threading.Thread(target=lambda: (link.sendall(sent), link.shutdown(socket.SHUT_WR)))
            writer.start()
            got = b""
            while some := link.recv(1 << 16):
                got += some
            writer.join()
        assert got == sent
    finally:
        way.close()


@pytest.mark.parametrize(
    "line", [b"CONNECT example.org:443 HTTP/1.1", b"CONNECT localhost:1 HTTP/1.1", b"GET http://localhost/ HTTP/1.1"]
)
def test_nothing_else_is_connected(echoing: int, line: bytes) -> None:
    way = Outlet("localhost", echoing)
    try:
        assert request(opened(way), line)[0] == b"HTTP/1.1 403 Forbidden"
    finally:
        way.close()


def test_a_request_without_an_end_and_connections_beyond_the_cap_are_dropped(
    echoing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "MOST", 2)
    way = Outlet("localhost", echoing)
    try:
        port = opened(way)
        with socket.create_connection(("127.0.0.1", port), 20) as link:
            link.sendall(b"CONNECT " + b"x" * outlet.LONGEST)
            assert link.recv(100).startswith(b"HTTP/1.1 403") or not link.recv(1)
        held = [request(port, b"CONNECT localhost:%d HTTP/1.1" % echoing) for _ in range(2)]
        assert [answer for answer, _ in held] == [b"HTTP/1.1 200 Connection established"] * 2
        with socket.create_connection(("127.0.0.1", port), 20) as link:
            assert link.recv(1) == b""
        for _, each in held:
            each.close()
    finally:
        way.close()


def test_a_server_that_is_not_there_and_a_way_that_is_closed(echoing: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = free.getsockname()[1]
    way = Outlet("127.0.0.1", gone)
    port = opened(way)
    assert request(port, b"CONNECT 127.0.0.1:%d HTTP/1.1" % gone)[0] == b"HTTP/1.1 502 Bad Gateway"
    other = opened(way)  # of the next process: the first one's is closed
    assert request(other, b"CONNECT 127.0.0.1:%d HTTP/1.1" % gone)[0] == b"HTTP/1.1 502 Bad Gateway"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 5)
    way.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", other), 5)
