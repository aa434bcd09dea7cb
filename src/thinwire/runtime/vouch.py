"""What a client of a secure sum signs of its keys, so that no server can put keys of its own in their place."""

from __future__ import annotations

from typing import Protocol

from thinwire.privacy.masks import KEY, numbered
from thinwire.runtime.payloads import Keys

SIGNATURE = 96  # bytes


class Vouch(Protocol):
    """What shows a client's peers that its keys are its own, whatever server hands them on."""

    def sign(self, text: bytes) -> bytes:
        """The signature of this place's own client."""
        ...

    def check(self, client: int, text: bytes, signature: bytes) -> None:
        """Raise Illegal for another's that is not its own."""
        ...


def vouched(run: int, round: int, attempt: bytes, client: int, seal: bytes, mask: bytes) -> bytes:
    """What a client signs of its two public halves: they are of one attempt at one sum."""
    return b"thinwire keys of a secure sum" + numbered(run, round, client) + attempt + seal + mask


def check_lengths(keys: Keys) -> None:
    """ValueError for a commitment or a signature of another length."""
    for name, part, size in (("commitment", keys.own, KEY), ("signature", keys.signature, SIGNATURE)):
        if part is not None and len(part) != size:
            raise ValueError(f"a {name} of {len(part)} bytes")
