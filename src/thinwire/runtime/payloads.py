"""What passes between a server and its clients beside a method's own payloads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from thinwire.wire.payload import LATE


def release() -> Any:
    """A field that derives from a client's data."""
    return field(metadata={"release": True})


@dataclass(frozen=True)
class Hello:
    """A client is asked whether it can take part; what a site compares stands beside every frame."""


@dataclass(frozen=True)
class Ready:
    """It can."""


@dataclass(frozen=True)
class Scores:
    """How the weights score on a client's rows; `heldout`: whether it trains on none of them.

    `mean_only`: true where they may be kept as a part of a mean of several clients alone.
    """

    examples: int = release()
    loss: float = release()
    accuracy: float | None = release()
    rouge_l: float | None = release()
    heldout: bool = release()
    mean_only: bool | None = field(default=None, metadata=LATE)


@dataclass(frozen=True)
class Invite:
    """A secure sum begins: a client is asked for its keys. `attempt`: bytes that no other attempt at a sum has."""

    attempt: bytes


@dataclass(frozen=True)
class Keys:
    """Public halves: of what shares are sealed with, of what masks follow from; and a commitment to its own mask.

    `signature`: of a site that vouches for its halves; see federation.vouching.
    """

    seal: bytes
    mask: bytes
    own: bytes
    signature: bytes | None = field(default=None, metadata=LATE)


@dataclass(frozen=True)
class Peers:
    """All clients of the sum, and of those that a client shares masks with, `ids`, the two public halves in order.

    `signatures`: theirs, in order, zeros of those that have none; left out where nobody has one.
    """

    attempt: bytes
    clients: list[int]
    ids: list[int]
    seals: bytes
    masks: bytes
    signatures: bytes | None = field(default=None, metadata=LATE)


@dataclass(frozen=True)
class Shares:
    """A client's secrets, shared: sealed for each of its peers, in their order."""

    sealed: bytes


@dataclass(frozen=True)
class Task:
    """A method's frame as it is, and the peers that have shared their secrets: the client masks its reply with them."""

    attempt: bytes
    ids: list[int]
    down: Tensor


@dataclass(frozen=True)
class Masked:
    """A client's terms under masks, packed: uint8."""

    numbers: Tensor = field(metadata={"release": True})


@dataclass(frozen=True)
class Remaining:
    """The clients whose masked replies came, and what peers have sealed for this one, in the order of `ids`."""

    attempt: bytes
    clients: list[int]
    ids: list[int]
    sealed: bytes


@dataclass(frozen=True)
class Unmasked:
    """Of each of `ids` one share: of its own mask where its reply came, else of the key of its masks with others."""

    ids: list[int]
    shares: bytes
