"""The one way out of a sandbox without a network: to the server's address, and to no other.

A process starts inside, listens on its own loopback, hands the listening socket to the client outside, and becomes the
program that is to run there. The client accepts what comes, and connects it to the server. Programs find the socket as
a proxy for HTTPS: what TLS protects is between them and the server as before.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading

MOST = 32  # connections at a time
LONGEST = 8192  # bytes of a request to connect
PATIENCE = 60.0  # seconds for a process to start inside, for a request to come, for the server to take a connection
STEP = 1 << 18


class Outlet:
    """The side outside: connects a sandbox to HOST:PORT."""

    def __init__(self, host: str, port: int) -> None:
        self.address = (host, port)
        self.room = threading.BoundedSemaphore(MOST)
        self.listener: socket.socket | None = None

    def open(self) -> socket.socket:
        """The end of a link for a process inside, which closes the way of the one before it."""
        self.close()
        mine, its = socket.socketpair()
        threading.Thread(target=self._serve, args=(mine,), daemon=True).start()
        return its

    def close(self) -> None:
        """Take no more connections."""
        if (listener := self.listener) is not None:
            self.listener = None
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes up whoever waits for a connection
            listener.close()

    def _serve(self, link: socket.socket) -> None:
        with link:
            link.settimeout(PATIENCE)
            try:
                _, given, _, _ = socket.recv_fds(link, 1, 1)
            except OSError:
                return
        if not given:
            return  # it has not started
        self.listener = listener = socket.socket(fileno=given[0])
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            if self.room.acquire(blocking=False):
                threading.Thread(target=self._connect, args=(one,), daemon=True).start()
            else:
                one.close()

    def _connect(self, inner: socket.socket) -> None:
        """Serve one connection from inside: whatever it asks for, it is the server or nothing."""
        try:
            with inner:
                inner.settimeout(PATIENCE)
                if not self._asked(inner):
                    inner.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                    return
                try:
                    outer = socket.create_connection(self.address, PATIENCE)
                except OSError:
                    inner.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
                    return
                with outer:
                    inner.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    for side in (inner, outer):
                        side.settimeout(None)
                    up = threading.Thread(target=_pass_on, args=(inner, outer), daemon=True)
                    up.start()
                    _pass_on(outer, inner)
                    up.join()
        except OSError:
            pass
        finally:
            self.room.release()

    def _asked(self, inner: socket.socket) -> bool:
        """Whether it asks for the server. Nothing comes after the request before it is answered."""
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            some = inner.recv(LONGEST - len(request))
            if not some:
                return False
            request += some
        host, port = self.address
        wanted = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return request.lower().split(b" ", 2)[:2] == [b"connect", wanted.lower().encode()]


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Send on what comes until one side ends."""
    with contextlib.suppress(OSError):
        while some := source.recv(STEP):
            target.sendall(some)
    for side, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            side.shutdown(how)


def main(link: int, command: list[str]) -> None:
    """Inside: hand a listening socket over by the link, and become the command."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(fileno=link) as outside:
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        socket.send_fds(outside, [b"x"], [listener.fileno()])
    os.execvpe(command[0], command, {**os.environ, "HTTPS_PROXY": proxy})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
