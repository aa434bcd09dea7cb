"""What can go wrong with bytes from elsewhere.

    WireError
    ├── Malformed   not a frame, or not of the kind or shape that was expected
    ├── Corrupt     the checksum does not match
    ├── TooLarge    beyond a cap; nothing was allocated for it
    └── Illegal     well formed, but not an answer that the method allows

A bad frame raises one of these and never anything else; the round drops that client and goes on.
"""


class WireError(Exception):
    """The bytes of a message cannot be used."""


class Malformed(WireError):
    """Not a frame of ours, or not one of the expected kind."""


class Corrupt(WireError):
    """The checksum does not match the bytes."""


class TooLarge(WireError):
    """A size in the frame is beyond its cap."""


class Illegal(WireError):
    """The payload decodes, but the method does not allow what it holds."""
