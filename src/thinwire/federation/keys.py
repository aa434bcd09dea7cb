"""Keys: a site's own pair, whose private half stays there; the server's certificate authority and certificate."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire import files
from thinwire.config import ConfigError
from thinwire.runtime.audit import Signer

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PUBLIC = "sites"  # the folder of the sites' public keys, NAME.pub each
DAYS = 825  # how long a certificate is good for
NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def make_site(name: str, folder: Path) -> Path:
    """A P-384 pair for a site: NAME.key, readable by its owner alone, and NAME.pub; returns the public file."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    _name(name)
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    _fresh(private)
    key = ec.generate_private_key(ec.SECP384R1())
    _private(private, key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()))
    half = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    public.write_bytes(half + f" {name}\n".encode())
    return public


def make_server(hosts: Sequence[str], folder: Path) -> Path:
    """A certificate authority (ca.key, ca.crt) if there is none, and a certificate (server.key, server.crt).

    `hosts`: names and addresses by which sites reach the server, for which the certificate is good; those of loopback
    are added. Returns ca.crt, which the sites need.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def begin(subject: str, issuer: str, key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=DAYS))
        )

    ca_key, ca_file = folder / "ca.key", folder / "ca.crt"
    if ca_key.exists():
        authority = form.load_pem_private_key(ca_key.read_bytes(), None)
        assert isinstance(authority, ec.EllipticCurvePrivateKey)
    else:
        authority = ec.generate_private_key(ec.SECP384R1())
        _private(ca_key, authority.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        built = begin("thinwire federation", "thinwire federation", authority)
        built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        built = built.add_extension(usage, critical=True)
        built = built.add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        ca_file.write_bytes(built.sign(authority, hashes.SHA384()).public_bytes(form.Encoding.PEM))
    key = ec.generate_private_key(ec.SECP384R1())
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not re.fullmatch("[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host):
                raise ConfigError(f"--host: {host!r} is neither a host name nor an address") from None
            names.append(x509.DNSName(host))
    built = begin(hosts[0] if hosts else "localhost", "thinwire federation", key)
    built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
    built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    built = built.add_extension(identifier, critical=False)
    certificate = built.sign(authority, hashes.SHA384()).public_bytes(form.Encoding.PEM)
    _private(folder / "server.key", key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    (folder / "server.crt").write_bytes(certificate)
    return ca_file


def check_server(folder: Path) -> None:
    """ConfigError where server.crt is not valid now, not of ca.crt, or not of server.key, as sites would find."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as form

    again = "make another with: thinwire keys server --host NAME"
    try:
        chain, roots = (
            x509.load_pem_x509_certificates((folder / name).read_bytes()) for name in ("server.crt", "ca.crt")
        )
        key = form.load_pem_private_key((folder / "server.key").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: its certificates cannot be read ({error}); {again}") from None
    now, own = datetime.datetime.now(datetime.UTC), chain[0]
    for name, found in [("server.crt", found) for found in chain] + [("ca.crt", roots[0])]:
        if now > found.not_valid_after_utc:
            raise ConfigError(f"{folder / name}: has expired on {found.not_valid_after_utc:%Y-%m-%d}; {again}")
        if now < found.not_valid_before_utc:
            raise ConfigError(f"{folder / name}: is not valid before {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    if len(chain) == 1 and not any(_issued(own, root) for root in roots):  # of a longer one sites see to the links
        raise ConfigError(f"{folder / 'server.crt'}: is not of the authority in ca.crt; {again}")
    if key.public_key() != own.public_key():
        raise ConfigError(f"{folder / 'server.key'}: is not the key of server.crt; {again}")


def signer_of(folder: Path) -> Signer:
    """What signs with server.key; ConfigError for a key that cannot."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = form.load_pem_private_key((folder / "server.key").read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / 'server.key'}: not an elliptic curve's key, as `thinwire keys server` makes them")
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode()
    return Signer(public, lambda text: base64.b64encode(key.sign(text.encode(), ec.ECDSA(hashes.SHA384()))).decode())


def certified(path: Path) -> str:
    """The public key of a certificate's file, as PEM; ConfigError for another file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as form

    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())[0].public_key()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--crt: {path} is no certificate ({error})") from None
    return found.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode()


def _issued(own: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        own.verify_directly_issued_by(root)
    except Exception:  # a signature, a name or a kind of key that does not fit: each has a type of its own
        return False
    return True


def register(name: str, public: str | Path, folder: Path, rows: int | None = None) -> Path:
    """Keep a site's public half, given as a file or as its line, under the site's name: sites/NAME.pub.

    `rows`: how many it may report to have trained on, in sites/NAME.rows; what is there stays where it is None.
    """
    _name(name)
    line = str(public)
    if not line.startswith("ecdsa-"):
        try:
            line = Path(public).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{public}: is neither a public key nor a file of one ({error})") from None
    target = folder / PUBLIC / f"{name}.pub"
    pem = _public(line.encode(), str(public))
    for other in sorted((folder / PUBLIC).glob("*.pub")):
        if other != target and public_bytes(other) == pem:
            raise ConfigError(f"{public}: this key is already that of {other.stem}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and public_bytes(target) != pem:
        raise ConfigError(f"{target}: {name} has another key already; to replace it: thinwire keys remove {name}")
    if rows is not None:
        files.write(target.with_name(f"{name}.rows"), f"{rows}\n")
    if not target.exists():  # a run that goes on may look at any moment
        files.write(target, line.strip() + "\n")
    removed_file(folder, name).unlink(missing_ok=True)
    return target


def registered(name: str, folder: Path) -> bool:
    """Whether a site of that name is."""
    _name(name)
    return (folder / PUBLIC / f"{name}.pub").exists()


def remove(name: str, folder: Path) -> None:
    """Have a site belong to no run any more, from each run's next round on; ConfigError for one that is not here."""
    _name(name)
    target = folder / PUBLIC / f"{name}.pub"
    if not target.exists():
        raise ConfigError(f"{target}: missing; there is no site {name} to remove")
    target.replace(removed_file(folder, name))
    files.flush(target.parent)


def removed_file(folder: Path, name: str) -> Path:
    """What is left of a site that was removed: its last key, by which nobody is admitted."""
    return folder / PUBLIC / f"{name}.removed"


def caps_of(folder: Path, sites: Sequence[str]) -> dict[int, int]:
    """Client -> the rows that its site was registered with, of those that were registered with a number."""
    files = {client: folder / PUBLIC / f"{name}.rows" for client, name in enumerate(sites)}
    try:
        return {client: int(file.read_text()) for client, file in files.items() if file.exists()}
    except ValueError as error:
        raise ConfigError(f"{folder / 'sites'}: a file of rows that holds no number ({error})") from None


def public_keys(folder: Path, report: Callable[[str], None] = lambda line: None) -> dict[str, bytes]:
    """Name -> the site's public key as Flower writes it, of the files NAME.pub, in the order of their registration.

    A file that holds no key is reported, and left out.
    """
    found = {}
    for path in sorted((folder / PUBLIC).glob("*.pub"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        try:
            found[path.stem] = public_bytes(path)
        except ConfigError as wrong:
            report(f"{wrong}; {path.stem} does not take part")
    return found


def public_bytes(path: Path) -> bytes:
    """The public key in a file, as Flower holds it (PEM); ConfigError if it is none on a NIST curve, or no file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return _public(content, str(path))


def _public(content: bytes, source: str) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = form.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{source}: not a public key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{source}: not an elliptic curve's key, as `thinwire keys site` makes them")
    return key.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)


def _name(name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{name!r} is not a site's name: letters, digits, dots, dashes; 64 at most")


def _fresh(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise ConfigError(f"{path}: there is a key already")


def _private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(content)
