"""The socket between a site's Flower process and its worker: one question and one answer a connection.

Both are a msgpack table and a body of bytes, each behind its length. The socket lies in a folder that its owner alone
may enter, and is closed to all others itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import msgpack

from thinwire.errors import ConfigError

MAX_TABLE = 1 << 22
MAX_BODY = 1 << 30  # as federation.chunk_bytes has it
MAX_NAMES = 64  # of a table
STEP = 1 << 24  # bytes that are made room for at a time: a length that is announced is not yet sent
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


def folder(home: Path) -> Path:
    """The folder for a site's sockets, its owner's alone, with a name short enough for one.

    The name is made of the site's folder, so that what a killed process left is used again, and then removed.
    ConfigError where that name is somebody else's.
    """
    name = hashlib.sha256(f"{os.getuid()} {home.resolve()}".encode()).hexdigest()[:16]
    place = Path("/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir()) / f"thinwire-{name}"
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{place}: is not a folder of this user; whose it is must remove it")
    place.chmod(0o700)
    return place


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
    packed = _exactly(link, length)
    size = int.from_bytes(_exactly(link, 8), "little")
    try:  # a flat table: what is nested would take a hundred times its own size
        table = msgpack.unpackb(packed, max_map_len=MAX_NAMES, max_array_len=0, max_ext_len=0, max_bin_len=0)
    except Exception as error:  # msgpack has many, and not all of one family
        raise ConnectionError(f"not a table: {type(error).__name__}") from None
    flat = isinstance(table, dict) and all(isinstance(value, str | int | float) for value in table.values())
    if not flat or size > MAX_BODY:
        raise ConnectionError("not what the other side sends")
    return table, _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < size:
        at = len(buffer)
        buffer.extend(bytes(min(STEP, size - at)))
        with memoryview(buffer) as view:
            while at < len(buffer):
                got = link.recv_into(view[at:])
                if not got:
                    raise ConnectionError("the other side has ended")
                at += got
    return bytes(buffer)
