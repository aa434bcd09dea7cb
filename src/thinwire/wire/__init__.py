"""The wire: payloads, frames, the ledger that counts them, and what can be wrong with them. Imports nothing of ours."""

from thinwire.wire.errors import Corrupt, Illegal, Malformed, TooLarge, WireError
from thinwire.wire.frame import Frame, Header, decode, encode, raw
from thinwire.wire.ledger import Ledger
from thinwire.wire.payload import LazyTensors, Stale
from thinwire.wire.together import Together, alone

__all__ = [
    "Corrupt",
    "Frame",
    "Header",
    "Illegal",
    "LazyTensors",
    "Ledger",
    "Malformed",
    "Stale",
    "Together",
    "TooLarge",
    "WireError",
    "alone",
    "decode",
    "encode",
    "raw",
]
