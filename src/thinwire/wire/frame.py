"""Frames: one message as bytes.

    bytes 0-3    b"thw" and the version of this format, 1
    bytes 4-7    length of the header, little-endian
    header       msgpack: [kind, run, round, client, held, [one entry a field of the payload]]
    buffers      the tensors' raw little-endian elements, in order, without gaps
    last 8       xxh3-64 of all before it, little-endian

A field's entry is its plain value, [dtype code, *shape] for a tensor, or {name: [dtype code, *shape]} for named ones.
The checksum catches accidents; who sent a frame is for the transport to know. Nothing received is ever unpickled, and
every size is checked against the bytes at hand before anything is allocated for it, and a header is built only where
it has no more lists and tables than a model has tensors: a receiver that knows the model gives it a cap of bytes too.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final, get_origin

import msgpack
import torch
import xxhash
from torch import Tensor

from thinwire.wire.errors import Corrupt, Malformed, TooLarge
from thinwire.wire.payload import MAX_DIMENSIONS, LazyTensors, Spec, fields_of, fits, kind_of, specs_of

MAGIC = b"thw\x01"
START = len(MAGIC) + 4  # of the header
CHECK = 8  # bytes of checksum
CHUNK = 1 << 22  # bytes of a file that are read at a time
MAX_HEADER = 1 << 23
MAX_LISTS = 1 << 17  # lists and tables in a header: a tensor has one
MAX_HELD = 128  # characters of a version
BESIDE = 1 << 12  # bytes of a header without its tables
ENTRY = 7 + 9 * MAX_DIMENSIONS  # most bytes of a tensor's entry besides its name
MAX_FRAME = 1 << 38
SPOOL_ABOVE = 1 << 24  # buffers larger than this go through a file where a folder for it is given
SMALL = 1 << 16  # bytes of a header up to which a frame keeps it once it is parsed
SHORT = 1 << 10  # headers up to here cannot announce more than a few megabytes of items, nested as they may be
KINDS = [[str, int, int, int, held, list] for held in (str, type(None))]  # of a header's six parts

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("thinwire frames are little-endian; this machine is not")

P = TypeVar("P")


class Header(NamedTuple):
    """All that a frame carries besides its payload. `held` is the version of the weights that the sender holds."""

    kind: str
    run: int
    round: int
    client: int
    held: str | None
    fields: list[Any]
    end: int  # where the tensors begin


@final
class Frame:
    """A message's bytes, in memory or in a file: nobody asks which. Whoever took one off the transport removes it."""

    __slots__ = ("_data", "_file", "_header", "_owned", "_size")

    def __init__(self, data: bytes) -> None:
        self._data, self._size = data, len(data)
        self._file: Path | None = None
        self._owned = False  # whether the file is this frame's, and goes with it
        self._header: Header | None = None

    @classmethod
    def in_file(cls, path: Path, size: int | None = None) -> Frame:
        """The frame in a file of its own, of `size` bytes or as long as that; it stays there until it is read."""
        frame = cls(b"")
        frame._file, frame._size, frame._owned = path, path.stat().st_size if size is None else size, True
        return frame

    @classmethod
    def load(cls, path: Path) -> Frame:
        """The frame in a file that stays whatever becomes of the frame; in memory if it is small."""
        frame = cls.in_file(path)
        frame._owned = False
        return frame if len(frame) > SPOOL_ABOVE else cls(path.read_bytes())

    @property
    def file(self) -> Path | None:
        """Where it lies, for another process of ours to `load`; None in memory."""
        return self._file

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return self.read(0, len(self))

    def header(self, max_header: int = MAX_HEADER) -> Header:
        """The header, checksum not yet verified; raises WireError."""
        if self._header is not None and self._header.end - START <= max_header:
            return self._header
        header = self._parse(max_header)
        if header.end <= SMALL:
            self._header = header
        return header

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from an offset on, at most `size` of them; OSError where the file is gone."""
        if self._file is None:
            return self._data[offset : offset + size]
        with self._file.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def chunks(self, size: int = MAX_FRAME) -> Iterator[bytes | memoryview]:
        """The first `size` bytes in order, of a file a few megabytes at a time; OSError where it is gone."""
        if self._file is None:
            yield memoryview(self._data)[:size]
        else:
            with self._file.open("rb") as file:
                while chunk := file.read(min(CHUNK, size)):
                    size -= len(chunk)
                    yield chunk

    def move_to(self, path: Path) -> None:
        """Write the frame to a path, whole or not at all; from then on that file is not this frame's to remove."""
        if self._file is None:
            partial = path.with_suffix(".part")
            partial.write_bytes(self._data)
            partial.replace(path)
        else:
            self._file.replace(path)
            self._file, self._owned = path, False

    def remove(self) -> None:
        """Delete the file, where the frame has one of its own."""
        if self._file is not None and self._owned:
            self._file.unlink(missing_ok=True)

    def verify(self) -> None:
        """Raise Malformed or Corrupt unless these are the bytes that `encode` wrote."""
        if len(self) < START + CHECK:
            raise Malformed(f"{len(self)} bytes are too short for a frame")
        if self._file is not None and not (self._file.is_file() and self._file.stat().st_size == len(self)):
            raise Malformed("the frame's file is missing or has another size")
        end = len(self) - CHECK
        if self._file is None:  # at once: a server takes in thousands a second
            found = xxhash.xxh3_64_intdigest(memoryview(self._data)[:end])
        else:
            digest = xxhash.xxh3_64()
            for chunk in self.chunks(end):
                digest.update(chunk)
            found = digest.intdigest()
        if found.to_bytes(CHECK, "little") != self.read(end, CHECK):
            raise Corrupt("the checksum does not match")

    def tensor(self, offset: int, spec: Spec) -> Tensor:
        """The tensor whose elements begin at an offset, in memory of its own; raises Malformed."""
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        flat = torch.frombuffer(self._buffer(offset, spec.nbytes), dtype=spec.dtype)
        return flat if len(spec.shape) == 1 else flat.reshape(spec.shape)

    def tensors(self, places: dict[str, tuple[int, Spec]]) -> Mapping[str, Tensor]:
        """The tensors at these places; those of a file are read when asked for."""
        if self._file is None:
            return {name: self.tensor(*place) for name, place in places.items()}
        return LazyTensors({name: spec for name, (_, spec) in places.items()}, lambda name: self.tensor(*places[name]))

    def _buffer(self, offset: int, size: int) -> bytearray:
        if self._file is None:
            return bytearray(self._data[offset : offset + size])
        buffer = bytearray(size)
        try:
            with self._file.open("rb") as file:
                file.seek(offset)
                got = file.readinto(buffer)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise Malformed("the frame's file cannot be read") from error
        if got != size:
            raise Malformed("the frame's file is shorter than its header announces")
        return buffer

    def _parse(self, max_header: int) -> Header:
        if len(self) < START + CHECK:
            raise Malformed(f"{len(self)} bytes are too short for a frame")
        head = self._buffer(0, START)
        if head[: len(MAGIC)] != MAGIC:
            raise Malformed("not a frame of this version")
        length = int.from_bytes(head[len(MAGIC) :], "little")
        if length > max_header:
            raise TooLarge(f"a header of {length} bytes is over the cap of {max_header}")
        if length > len(self) - START - CHECK:
            raise Malformed("the header is longer than the frame")
        return _header(self._buffer(START, length))


def encode(
    payload: Any,
    *,
    run: int = 0,
    round: int = 0,
    client: int = 0,
    held: str | None = None,
    spool: Path | None = None,
) -> Frame:
    """The frame of a payload; in a new file in the folder `spool` if it is large, else in memory.

    TypeError if the payload holds what cannot travel.
    """
    header, total = _packed(payload, run, round, client, held)
    head = MAGIC + len(header).to_bytes(4, "little") + header
    digest = xxhash.xxh3_64(head)
    if spool is None or total <= SPOOL_ABOVE:
        parts = [head]
        for buffer in _buffers(payload):
            digest.update(buffer)
            parts.append(bytes(buffer))
        return Frame(b"".join([*parts, digest.intdigest().to_bytes(CHECK, "little")]))
    with tempfile.NamedTemporaryFile(dir=spool, suffix=".frame", delete=False) as file:
        file.write(head)
        for buffer in _buffers(payload):
            digest.update(buffer)
            file.write(buffer)
        file.write(digest.intdigest().to_bytes(CHECK, "little"))
    return Frame.in_file(Path(file.name), len(head) + total + CHECK)


def length(payload: Any, *, run: int = 0, round: int = 0, client: int = 0, held: str | None = None) -> int:
    """The length of the frame that `encode` would make; its tensors may be on the device meta. TypeError as there."""
    header, total = _packed(payload, run, round, client, held)
    return START + len(header) + total + CHECK


def header_room(payload: type, names: Iterable[str]) -> int:
    """The most bytes that the header of such a payload needs whose tables hold tensors of these names and no others.

    A payload with texts, bytes or lists of its own has no such bound: MAX_HEADER.
    """
    fields = fields_of(payload)
    if any(field.form in (str, bytes) or get_origin(field.form) is list for field in fields):
        return MAX_HEADER
    table = sum(len(name.encode()) + ENTRY for name in names)
    return min(MAX_HEADER, BESIDE + table * sum(field.many_tensors for field in fields))


def decode(payload: type[P], frame: Frame, max_bytes: int = MAX_FRAME, max_header: int = MAX_HEADER) -> P:
    """The payload in a frame, verified; named tensors of a frame in a file are read when asked for.

    Raises Malformed, Corrupt or TooLarge, and nothing else, whatever the bytes are; OSError where this machine cannot
    read the file of a frame that is there.
    """
    if len(frame) > max_bytes:
        raise TooLarge(f"a frame of {len(frame)} bytes is over the cap of {max_bytes}")
    frame.verify()
    header = frame.header(max_header)
    offset = header.end
    if header.kind != kind_of(payload):
        raise Malformed(f"a frame of kind {header.kind[:40]!r} where {kind_of(payload)!r} was expected")
    fields = fields_of(payload)
    if len(fields) < len(header.fields) or not all(field.late for field in fields[len(header.fields) :]):
        raise Malformed(f"{payload.__name__} has {len(fields)} fields, the frame {len(header.fields)}")
    values: dict[str, Any] = {}
    for field, entry in zip(fields, header.fields, strict=False):  # late ones may not be there
        if entry is None and field.optional:
            values[field.name] = None
        elif field.one_tensor:
            spec = Spec.parse(entry)
            _room(frame, offset, spec.nbytes)
            values[field.name] = frame.tensor(offset, spec)
            offset += spec.nbytes
        elif field.many_tensors:
            if not isinstance(entry, dict) or not all(isinstance(name, str) for name in entry):
                raise Malformed(f"{payload.__name__}.{field.name} is not a table of tensors")
            places = {}
            for name, packed in entry.items():
                spec = Spec.parse(packed)
                _room(frame, offset, spec.nbytes)
                places[name] = (offset, spec)
                offset += spec.nbytes
            values[field.name] = frame.tensors(places)
        elif fits(entry, field):
            values[field.name] = entry
        else:
            raise Malformed(f"{payload.__name__}.{field.name} has the wrong type")
    if offset != len(frame) - CHECK:
        raise Malformed("the frame is longer than its header announces")
    return payload(**values)


def raw(tensor: Tensor) -> memoryview:
    """The elements of a tensor as little-endian bytes, in order; a view where its memory allows."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def absorb(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Have a hash take in named tensors: name, dtype, shape and elements of each."""
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(raw(tensor))


def _packed(payload: Any, run: int, round: int, client: int, held: str | None) -> tuple[bytes, int]:
    """The header, and the bytes of all tensors."""
    entries: list[Any] = []
    total = 0
    for field in fields_of(type(payload)):
        value = getattr(payload, field.name)
        if value is None and field.optional:
            entries.append(None)
        elif field.one_tensor:
            spec = Spec.of(value)
            entries.append(spec.packed())
            total += spec.nbytes
        elif field.many_tensors:
            specs = specs_of(value)
            entries.append({name: spec.packed() for name, spec in specs.items()})
            total += sum(spec.nbytes for spec in specs.values())
        elif fits(value, field):
            entries.append(value)
        else:
            raise TypeError(f"{type(payload).__name__}.{field.name} is not {field.form}: {value!r:.60}")
    for field in reversed(fields_of(type(payload))):
        if not field.late or entries[-1] is not None:
            break
        entries.pop()
    try:
        header = msgpack.packb([kind_of(type(payload)), run, round, client, held, entries])
    except (ValueError, OverflowError) as error:  # text that is not Unicode, an integer beyond 64 bits
        raise TypeError(f"{type(payload).__name__} holds what cannot travel: {error}") from error
    if len(header) > MAX_HEADER:
        raise TypeError(f"{type(payload).__name__} has {len(header)} bytes besides its tensors, over {MAX_HEADER}")
    return header, total


def _buffers(payload: Any) -> Iterator[memoryview]:
    for field in fields_of(type(payload)):
        value = getattr(payload, field.name)
        if value is None:
            continue
        if field.one_tensor:
            yield raw(value)
        elif field.many_tensors:
            for tensor in value.values():
                yield raw(tensor)


def _room(frame: Frame, offset: int, size: int) -> None:
    if size > len(frame) - CHECK - offset:
        raise Malformed("the header names more tensor bytes than the frame has")


def _header(packed: bytearray) -> Header:
    hooks: dict[str, Any] = {}
    try:
        if len(packed) > SHORT:
            whole = msgpack.Unpacker(max_buffer_size=len(packed))
            whole.feed(packed)
            whole.skip()  # builds nothing, and fails unless every item that a length announces is there
            count = _Count(MAX_LISTS)
            hooks = {"list_hook": count, "object_hook": count}
        parts = msgpack.unpackb(packed, use_list=True, strict_map_key=True, **hooks)
    except Exception as error:  # msgpack raises many kinds, down to its own stack's; all mean the same here
        raise Malformed("the header is not msgpack") from error
    if not isinstance(parts, list) or len(parts) != 6:
        raise Malformed("the header does not have its six parts")
    if [type(part) for part in parts] not in KINDS:
        raise Malformed("a part of the header has the wrong type")
    kind, run, round, client, held, fields = parts
    if held is not None and (len(held) > MAX_HELD or not held.isascii() or not held.isprintable()):
        raise Malformed("the version in the header is none")
    return Header(kind, run, round, client, held, fields, START + len(packed))


class _Count:
    """A hook of msgpack that ends the reading at the first list or table beyond `left`."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, value: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("more lists than any model has tensors")
        return value
