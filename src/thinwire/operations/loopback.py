"""A server on loopback for a few paths, each made when it is asked for; it reads no file that a request names.

A browser asks as a user of this machine; who came under another host's name, as a page of elsewhere can make a browser
do, is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from thinwire.errors import UserError

HOST = "127.0.0.1"
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
Paths = Mapping[str, tuple[str, Callable[[], bytes]]]  # path -> its content type, and what makes it


@contextmanager
def served(paths: Paths, port: int) -> Iterator[int]:
    """Serve the paths in a thread; yields the port, any free one for 0. OSError where it is taken."""
    with _server(paths, port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def _server(paths: Paths, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "thinwire", ""
        timeout = 30

        def do_GET(self) -> None:
            """Answer, if the request came by this server's own name and for one of its paths."""
            names = {f"{host}:{server.server_port}" for host in (HOST, "localhost")}
            if self.headers.get("Host") not in names:
                return self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this is not that host\n")
            if self.path not in paths:
                return self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
            kind, make = paths[self.path]
            try:
                content = make()
            except UserError as error:
                return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n".encode())
            return self._answer(HTTPStatus.OK, kind, content)

        do_HEAD = do_GET  # noqa: N815 - the library's name

        def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            self.send_response(status)
            headers = HEADERS | {"Content-Type": kind, "Content-Length": str(len(content))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Not a line for each question of the page's."""

    server = ThreadingHTTPServer((HOST, port), Handler)
    return server
