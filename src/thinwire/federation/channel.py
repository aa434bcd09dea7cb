"""The socket between a site's Flower process and its worker: one question and one answer a connection.

Both are a msgpack table and a body of bytes, each behind its length. The socket lies in a folder that its owner alone
may enter, and is closed to all others itself.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import msgpack

MAX_TABLE = 1 << 22
MAX_BODY = 1 << 31
Table = dict[str, Any]


class Down(ConnectionError):
    """The worker does not answer, or has died while it was at work."""


def listen(path: Path) -> socket.socket:
    """A socket at the path that its owner alone can connect to."""
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    server.listen(8)
    return server


def folder() -> Path:
    """A new folder for sockets, its owner's alone, with a name short enough for one."""
    return Path(tempfile.mkdtemp(prefix="thinwire-", dir="/tmp" if Path("/tmp").is_dir() else None))


def ask(path: Path, table: Table, body: bytes = b"", patience: float = 120.0) -> tuple[Table, bytes]:
    """The worker's answer; a worker that is being started is waited for. Raises Down."""
    until = time.monotonic() + patience
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(str(path))
            break
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            if time.monotonic() > until:
                raise Down(f"the site's worker does not answer within {patience:g} seconds") from None
            time.sleep(0.1)
    with client:
        try:
            send(client, table, body)
            return receive(client)
        except ConnectionError:
            raise Down("the site's worker died at work") from None


def send(link: socket.socket, table: Table, body: bytes = b"") -> None:
    """Write a table and a body."""
    packed = msgpack.packb(table)
    link.sendall(len(packed).to_bytes(4, "little") + packed + len(body).to_bytes(8, "little"))
    if body:  # a write of nothing to a side that has answered and gone would fail
        link.sendall(body)


def receive(link: socket.socket) -> tuple[Table, bytes]:
    """Read a table and a body; ConnectionError where the other side ends or sends nonsense."""
    length = int.from_bytes(_exactly(link, 4), "little")
    if length > MAX_TABLE:
        raise ConnectionError("a table beyond its cap")
    table = msgpack.unpackb(_exactly(link, length))
    size = int.from_bytes(_exactly(link, 8), "little")
    if not isinstance(table, dict) or size > MAX_BODY:
        raise ConnectionError("not what the other side sends")
    return table, _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        got = link.recv_into(view)
        if not got:
            raise ConnectionError("the other side has ended")
        view = view[got:]
    return bytes(buffer)
