"""Sites that vouch for their keys to each other: of a secure sum no server can then stand between two of them.

Each round's public keys are made afresh, and reach the others through the server. A site that was given the others'
public keys by another way (`thinwire client --peers`) signs its own halves with its private key, together with the run,
the round, the attempt and its number there, and masks no reply with halves that are not so signed. ECDSA on P-384 with
SHA-384, as 48 + 48 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.errors import ConfigError
from thinwire.federation.keys import public_bytes
from thinwire.federation.site import Site
from thinwire.wire import Illegal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

HALF = 48  # bytes of a number on the curve


class Vouching:
    """A site's private key, and the public ones of the others, by the names of the run's clients in order.

    ConfigError for a private key that is none on P-384, a file that holds no public key, or a name that two clients of
    the run have: one site's signatures would then be those of both, and a sum would be over fewer than it seems.
    """

    def __init__(self, key: Path, peers: Path, names: Sequence[str] = ()) -> None:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization as form
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            private = form.load_ssh_private_key(key.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a passphrase
            raise ConfigError(f"{key}: not a site's private key ({error})") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP384R1):
            raise ConfigError(f"{key}: not a key on P-384, as `thinwire keys site` makes them")
        if len({*names}) < len(names):
            raise ConfigError("sites: two clients of the run have the same name, and their keys one signature")
        self.private, self.names = private, names
        self.known = {path.stem: _loaded(path) for path in sorted(peers.glob("*.pub"))}
        if not self.known:
            raise ConfigError(f"--peers: {peers} holds no site's public key, NAME.pub")

    @classmethod
    def of(cls, site: Site, names: Sequence[str] = ()) -> Vouching | None:
        """As the site's operator has it, None where it does not vouch."""
        if site.key is None or site.peers is None:
            return None
        return cls(Path(site.key), Path(site.peers), names)

    def sign(self, text: bytes) -> bytes:
        """See runtime.vouch.Vouch."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        numbers = decode_dss_signature(self.private.sign(text, ec.ECDSA(hashes.SHA384())))
        return b"".join(number.to_bytes(HALF, "big") for number in numbers)

    def check(self, client: int, text: bytes, signature: bytes) -> None:
        """See runtime.vouch.Vouch."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

        name = self.names[client] if 0 <= client < len(self.names) else f"client {client}"
        if (known := self.known.get(name)) is None:
            raise Illegal(f"this site has no public key of {name}'s, and masks no reply with it")
        r, s = (int.from_bytes(half, "big") for half in (signature[:HALF], signature[HALF:]))
        try:
            known.verify(encode_dss_signature(r, s), text, ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            raise Illegal(f"the keys that came as {name}'s are not signed by it") from None


def _loaded(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = form.load_pem_public_key(public_bytes(path))
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key
