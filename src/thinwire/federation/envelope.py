"""What a message of the engine carries: a piece of a frame as one opaque array, and a record of which piece.

Imports nothing of ours: a site's Flower process, which lives for one message, needs no more than this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.app import RecordDict

STYPE = "thinwire.frame"  # no strategy of the engine's knows what to do with it
Config = dict[str, str | int | float]


def pack(piece: bytes, **config: str | int | float) -> RecordDict:
    """The content of a message: a piece of a frame, and the values that describe it."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    records: Any = {"about": ConfigRecord(dict(config))}
    if piece:
        records["frame"] = ArrayRecord({"piece": Array("uint8", (len(piece),), STYPE, piece)})
    return RecordDict(records)


def unpack(content: RecordDict) -> tuple[bytes, Config]:
    """The inverse of `pack`; ValueError for a content that it has not made."""
    try:
        about: Any = dict(content["about"])
        piece: Any = content["frame"]["piece"] if "frame" in content else None
    except (KeyError, TypeError):
        raise ValueError("a message without the records of thinwire") from None
    if piece is not None and (piece.stype != STYPE or piece.dtype != "uint8"):
        raise ValueError(f"an array of type {piece.stype} in place of a frame")
    return b"" if piece is None else piece.data, about
