"""What secure sums are made of: keys that two clients agree on, streams of masks, sealed shares, shared secrets.

X25519 (RFC 7748), HKDF-SHA256 and ChaCha20 with Poly1305 of `cryptography`; Shamir's sharing over GF(2^128) of
`pycryptodome`. A client's secrets are seeds of 128 bits, so that one share of 16 bytes is all that a holder has: the
private key that masks follow from is an HKDF of its seed. All of it is bound to a `place`, bytes that name the run, the
round, the attempt and the cohort: what was made for one opens nothing in another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SEED = 16  # bytes of a secret that is shared
KEY = 32
SEALED = 2 * SEED + 16  # bytes of a peer's two shares under seal
TRIES = 200  # sets of shares that are looked at for one that gives a secret
Random = Callable[[int], bytes]  # the operating system's; tests hand in one that repeats


def derived(secret: bytes, *about: bytes) -> bytes:
    """A key of 32 bytes, HKDF-SHA256 of a secret: another one for whatever it is about."""
    info = b"thinwire secure sum" + b"".join(len(part).to_bytes(4, "little") + part for part in about)
    return HKDF(SHA256(), KEY, None, info).derive(secret)


def numbered(*numbers: int) -> bytes:
    """Numbers as bytes that no other numbers give."""
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def stream(key: bytes, size: int) -> bytes:
    """The first bytes of a mask: ChaCha20 under a key that nothing else is done with."""
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(size))


@dataclass(frozen=True)
class Pair:
    """A key pair of X25519 that follows from a seed."""

    seed: bytes = field(repr=False)

    @property
    def private(self) -> X25519PrivateKey:
        """The private half."""
        return X25519PrivateKey.from_private_bytes(derived(self.seed, b"private"))

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self.private.public_key().public_bytes_raw()

    def agree(self, other: bytes, *about: bytes) -> bytes:
        """The key that both ends have, by the other's public half; ValueError for bytes that are none."""
        return derived(self.private.exchange(X25519PublicKey.from_public_bytes(other)), *about)


def check_public(*keys: bytes) -> None:
    """ValueError for public halves that are none, are the same twice, or that every private half gives one key with."""
    if len(set(keys)) < len(keys):
        raise ValueError("a public key is there twice")
    for key in keys:
        if len(key) != KEY:
            raise ValueError(f"a public key of {len(key)} bytes")
        Pair(bytes(SEED)).agree(key)  # raises for points of small order


def pair_mask(own: Pair, other: bytes, place: bytes, one: int, two: int) -> bytes:
    """The key of the mask between two clients, the same at both ends whichever asks."""
    return own.agree(other, b"mask", place, numbered(min(one, two), max(one, two)))


def self_mask(seed: bytes, place: bytes, client: int) -> bytes:
    """The key of a client's own mask."""
    return derived(seed, b"self", place, numbered(client))


def sealed(own: Pair, other: bytes, place: bytes, sender: int, to: int, shares: bytes) -> bytes:
    """Two shares for a peer, which only it can open."""
    key, about = own.agree(other, b"seal", place, numbered(sender, to)), place + numbered(sender, to)
    return ChaCha20Poly1305(key).encrypt(bytes(12), shares, about)  # a key for one message: its nonce may be 0


def opened(own: Pair, other: bytes, place: bytes, sender: int, to: int, data: bytes) -> bytes | None:
    """The inverse; None for what this sender has not sealed for this client, here and now."""
    key, about = own.agree(other, b"seal", place, numbered(sender, to)), place + numbered(sender, to)
    try:
        shares = ChaCha20Poly1305(key).decrypt(bytes(12), data, about)
    except InvalidTag:
        return None
    return shares if len(shares) == 2 * SEED else None


def split(secret: bytes, holders: int, least: int) -> list[bytes]:
    """A share for each holder, of which any `least` give the secret and fewer give nothing. [SEED] bytes each.

    The polynomial's coefficients come from the operating system by way of pycryptodome.
    """
    if holders == 1:
        return [secret]
    from Crypto.Protocol.SecretSharing import Shamir

    return [share for _, share in Shamir.split(least, holders, secret, False)]


def joined(shares: Mapping[int, bytes], least: int) -> bytes:
    """The secret of `least` shares or more, by the holders' places from 0; ValueError for fewer."""
    if len(shares) < least:
        raise ValueError(f"{len(shares)} shares where {least} are needed")
    if least == 1:
        return next(iter(shares.values()))
    from Crypto.Protocol.SecretSharing import Shamir

    secret: bytes = Shamir.combine([(place + 1, share) for place, share in sorted(shares.items())[:least]], False)
    return secret


def recovered(shares: Mapping[int, bytes], least: int, right: Callable[[bytes], bool]) -> bytes | None:
    """The secret of some of the shares that is `right`: those of a holder who lies are passed over. None: of none."""
    for some in islice(combinations(sorted(shares), least), TRIES):
        secret = joined({place: shares[place] for place in some}, least)
        if right(secret):
            return secret
    return None


def least_of(holders: int, share: float) -> int:
    """How many of so many holders are a `share` of them: more than half in any case, so no two sets do without one."""
    return min(holders, max(holders // 2 + 1, -int(-(holders * share) // 1)))


def neighbours(clients: Sequence[int], count: int | None, order: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Whom each client shares masks with: all others, or of a circle in that order the nearest count // 2 at each side.

    Bell et al. 2020's Harary graph. `order`: numbers to sort by, drawn for the round; an odd count is rounded up.
    """
    circle = [client for _, client in sorted(zip(order, clients, strict=True))]
    if count is None or count >= len(circle) - 1:
        return {client: tuple(sorted({*circle} - {client})) for client in circle}
    reach = -(-count // 2)
    near = [shift for shift in range(-reach, reach + 1) if shift]
    return {
        client: tuple(sorted({circle[(at + shift) % len(circle)] for shift in near} - {client}))
        for at, client in enumerate(circle)
    }


def system(size: int) -> bytes:
    """From the operating system's cryptographic generator."""
    return os.urandom(size)
