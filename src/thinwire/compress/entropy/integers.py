"""Integers in few bytes: the narrowest width that holds them all, then zstandard, whose entropy coder does the rest."""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

LEVEL = 19  # lower ones lose up to half on changes that are mostly 0
WIDTHS = (1, 2, 4, 8)


def pack(values: NDArray[np.int64]) -> bytes:
    """int64 [n] as bytes; the smaller of magnitude the values, the fewer. The same bytes for the same zstandard."""
    # zigzag: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..., so that small values of both signs have small codes
    codes = ((values << 1) ^ (values >> 63)).view(np.uint64)
    top = int(codes.max(initial=0))
    width = next(width for width in WIDTHS if top < 1 << 8 * width)
    # byte by byte of all values: the upper ones are mostly equal
    planes = codes.astype(f"<u{width}").view(np.uint8).reshape(-1, width).T.tobytes()
    packed = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False).compress(planes)
    return bytes([width]) + (packed if len(packed) < len(planes) else planes)


def unpack(data: bytes, count: int) -> NDArray[np.int64]:
    """The inverse for `count` values: int64 [count]; ValueError for anything that `pack` would not have made."""
    width = data[0] if data else 0
    if width not in WIDTHS:
        raise ValueError("packed integers have no known width")
    size, body = width * count, data[1:]
    if len(body) != size:
        try:
            # one byte more than allowed, so that what is too long shows without being unpacked
            with zstandard.ZstdDecompressor().stream_reader(body) as reader:
                body = reader.read(size + 1)
        except zstandard.ZstdError as error:
            raise ValueError(f"packed integers do not unpack: {error}") from None
        if len(body) != size:
            raise ValueError(f"packed integers are not {count} of {width} bytes")
    planes = np.frombuffer(body, np.uint8).reshape(width, count)
    codes = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(count).astype(np.uint64)
    return (codes >> np.uint64(1)).view(np.int64) ^ -(codes & np.uint64(1)).view(np.int64)
