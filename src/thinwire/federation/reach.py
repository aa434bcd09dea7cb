"""Whether a server can be reached, and is itself, before any of Flower's processes begins; reasons for people."""

from __future__ import annotations

import errno
import socket
import ssl
import time
from pathlib import Path

from thinwire.errors import ConfigError

SECONDS = 4.0  # that a server has to answer
PAUSE = 0.5  # seconds between two attempts to listen
EXPIRED, EARLY, HOSTNAME, ADDRESS = 10, 9, 62, 64  # OpenSSL's numbers for what is wrong with a certificate


class Away(Exception):
    """The server cannot be reached now, and may be later; the message is the reason."""


def place_of(text: str, option: str) -> tuple[str, int]:
    """HOST:PORT taken apart, [ADDRESS]:PORT too; ConfigError that names the option."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{option}: {text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def greet(server: str, ca: Path) -> None:
    """Shake hands with a server as its certificate authority's file demands.

    ConfigError for what does not mend itself: another authority, another host, a port without TLS. Away else.
    """
    host, port = place_of(server, "--server")
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (ssl.SSLError, OSError):
        raise ConfigError(f"--ca: {ca} holds no certificate") from None
    try:
        with socket.create_connection((host, port), SECONDS) as link, context.wrap_socket(link, server_hostname=host):
            return
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (HOSTNAME, ADDRESS):
            text = f"--server: the certificate of {server} is for other names than {host}; there: thinwire keys server"
            raise ConfigError(f"{text} --host {host}") from None
        if error.verify_code in (EXPIRED, EARLY):
            raise Away(f"the certificate of {server} is not valid now ({error.verify_message})") from None
        raise ConfigError(
            f"--ca: the certificate of {server} is not of the authority in {ca} ({error.verify_message})"
        ) from None
    except ssl.SSLEOFError:  # what stands before a hub that is away takes connections, and ends them
        raise Away(f"{server} cannot be reached (it ended the connection)") from None
    except ssl.SSLError as error:
        raise ConfigError(f"--server: {server} speaks no TLS that this machine knows ({error.reason})") from None
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise Away(f"the name {host} cannot be looked up now ({error.strerror})") from None
        raise ConfigError(f"--server: there is no host {host} ({error.strerror})") from None
    except ConnectionRefusedError:
        raise Away(f"nothing listens at {server} (connection refused)") from None
    except TimeoutError:
        raise Away(f"{server} does not answer within {SECONDS:g} seconds") from None
    except OSError as error:
        raise Away(f"{server} cannot be reached ({error.strerror or error})") from None


def listening(host: str, port: int, option: str, seconds: float = 0.0) -> None:
    """ConfigError where a process of this machine could not listen there, also not so many seconds later."""
    until = time.monotonic() + seconds
    while True:
        try:
            return _listening(host, port, option)
        except ConfigError:
            if time.monotonic() >= until:
                raise
        time.sleep(PAUSE)


def _listening(host: str, port: int, option: str) -> None:
    wanted = f"{option}: {host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nginx does: what has just ended is no bar
            probe.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"{wanted} is no address of this machine ({error.strerror})") from None
    except OSError as error:
        why = {
            errno.EADDRINUSE: "is in use by another program",
            errno.EADDRNOTAVAIL: "is no address of this machine",
            errno.EACCES: "is for the system's administrator alone",
        }.get(error.errno or 0, f"cannot be listened at ({error.strerror or error})")
        raise ConfigError(f"{wanted} {why}") from None
