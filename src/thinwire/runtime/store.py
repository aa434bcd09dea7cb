"""What must outlive a process: versions of the global weights, and what is private to each client."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from operator import itemgetter
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thinwire.errors import Damaged
from thinwire.files import whole
from thinwire.wire import LazyTensors
from thinwire.wire.frame import absorb
from thinwire.wire.payload import Spec

# of a safetensors file, as far as they can travel
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def version_of(tensors: Mapping[str, Tensor]) -> str:
    """The content hash (32 hex digits of sha256) of named tensors, whatever their order."""
    digest = hashlib.sha256()
    absorb(digest, ((name, tensors[name]) for name in sorted(tensors)))
    return digest.hexdigest()[:32]


def write_atomically(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """A safetensors file that is either whole or not there; `about` is its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        # safetensors refuses tensors that share memory, such as a tied pair.
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor.detach().clone().contiguous() if shared else tensor.detach().contiguous()
    with whole(path) as partial:
        save_file(own, partial, dict(about) if about else None)


class _File:
    """A safetensors file that the library finds whole: its specs, its metadata, and a tensor when it is asked for.

    The tensors are read here: the library (0.8.0) keeps 56 bytes of each that it has read for as long as a process
    lives. SafetensorError for what is no such file; OSError where the system does not give it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                self.metadata: dict[str, str] = file.metadata() or {}
        except RuntimeError as error:  # torch's word for a file that cannot be opened
            raise OSError(str(error).partition("\n")[0]) from error
        with path.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
        if unknown := {header[name]["dtype"] for name in names} - set(DTYPES):
            raise SafetensorError(f"tensors of {min(unknown)}")
        self.start = 8 + length
        self.specs = {name: Spec(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])) for name in names}
        self.places = {name: header[name]["data_offsets"][0] for name in names}

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        spec, buffer = self.specs[name], bytearray(self.specs[name].nbytes)
        with self.path.open("rb") as content:
            content.seek(self.start + self.places[name])
            if content.readinto(buffer) != len(buffer):
                raise SafetensorError(f"{name} is cut")
        return (
            torch.frombuffer(buffer, dtype=spec.dtype).reshape(spec.shape)
            if buffer
            else torch.empty(spec.shape, dtype=spec.dtype)
        )


class VersionStore:
    """Versions of named tensors in a folder, addressed by content; only the `keep` newest stay.

    A file that is damaged counts as not held. What `get` returned can be read until `keep` more versions were put. With
    `late` what is beyond the bound stays until `trim`: a round that is cut off and done again then finds what it found.
    """

    def __init__(self, folder: Path, keep: int = 8, late: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"a version store must keep at least one version, not {keep}")
        self.folder, self.keep, self.late = folder, keep, late
        self._verified: set[str] = set()  # each file is hashed once in the life of this object

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep these tensors; returns their version. Drops the oldest beyond the bound."""
        version = version_of(tensors)
        path = self._path(version)
        if self.get(version) is not None:
            os.utime(path)
        else:
            write_atomically(path, tensors)
            self._verified.add(version)
        if not self.late:
            self.trim(path)
        return version

    def trim(self, newest: Path | None = None) -> None:
        """Drop the oldest versions beyond the bound; `newest`, that was just put, stays whatever the clock shows."""
        for old in self._files()[: -self.keep]:
            if old != newest:
                old.unlink()

    def kept(self) -> list[str]:
        """The versions that `trim` leaves, oldest first."""
        return [file.stem for file in self._files()[-self.keep :]]

    def rewind(self, kept: Sequence[str]) -> None:
        """Leave these versions alone, in this order: what a round that was cut off has put is gone."""
        for file in self._files():
            if file.stem not in kept:
                file.unlink()
        now = time.time_ns()
        for i, version in enumerate(kept, -len(kept)):
            if self._path(version).exists():  # the system's own clock for files has too coarse a tick for an order
                os.utime(self._path(version), ns=(now + i, now + i))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"), key=lambda p: (p.stat().st_mtime_ns, p.name))

    def get(self, version: str) -> Mapping[str, Tensor] | None:
        """The tensors of a version, each read when asked for; None if it is not held (any more)."""
        path = self._path(version)
        if not re.fullmatch("[0-9a-f]{32}", version) or not path.is_file():
            return None

        try:
            file = _File(path)
            tensors = LazyTensors(file.specs, file.read)
            if version not in self._verified and version_of(tensors) != version:
                return None
        except SafetensorError:
            return None
        self._verified.add(version)
        return tensors

    def _path(self, version: str) -> Path:
        return self.folder / f"{version}.safetensors"


class ClientMemory(MutableMapping[str, Tensor]):
    """One client's own tensors: read from its newest file before `round`, written to a new one by `commit`.

    `newest`: the round of that file, if it is known. Damaged where the file is gone, or not as it was written. A file a
    round, so that a run resumed from an earlier checkpoint finds the memory of that checkpoint. What was read is
    written too: a half may change its tensors in place.
    """

    def __init__(self, folder: Path, round: int, newest: int | None = None) -> None:
        self.folder, self.round, self.newest = folder, round, newest
        self._tensors: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._loaded()[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._loaded()[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def commit(self) -> bool:
        """Write the memory as it is after this round, if it was looked at and ever held anything; whether so."""
        if not self._tensors and (self._tensors is None or not files_by_round(self.folder)):
            return False
        write_atomically(self._file(self.round), self._tensors, {"digest": _digest(self._tensors)})
        return True

    def _loaded(self) -> dict[str, Tensor]:
        if self._tensors is None:
            # Strictly before: a file of this very round is from a run that was cut off within it.
            files = [file for round, file in files_by_round(self.folder) if round < self.round]
            if self.newest is not None:
                files = [self._file(self.newest)]
            self._tensors = _verified(files[-1]) if files else {}
        return self._tensors

    def _file(self, round: int) -> Path:
        return self.folder / f"{round:06d}.safetensors"

    @staticmethod
    def prune(folder: Path, oldest: int) -> None:
        """Drop the files that no checkpoint from round `oldest` on can need."""
        for _, file in [item for item in files_by_round(folder) if item[0] <= oldest][:-1]:
            file.unlink()


def files_by_round(folder: Path) -> list[tuple[int, Path]]:
    """A client's files, oldest first; what else lies in the folder is passed over."""
    return sorted((int(f.stem), f) for f in folder.glob("*.safetensors") if f.stem.isdecimal())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, specs and elements; against accidents, and faster than any disk."""
    digest = xxhash.xxh3_128()
    absorb(digest, sorted(tensors.items(), key=itemgetter(0)))
    return digest.hexdigest()


def _verified(file: Path) -> dict[str, Tensor]:
    """The tensors of a client's file; Damaged where it is gone, cut or changed. Older files have no digest."""
    where = f"the memory of client {file.parent.name} after round {file.stem.lstrip('0')}"
    try:
        opened = _File(file)
        tensors = {name: opened.read(name) for name in opened.specs}
        written = opened.metadata.get("digest")
    except FileNotFoundError:
        raise Damaged(f"{where} is missing ({file})") from None
    except SafetensorError as error:
        raise Damaged(f"{where} is damaged ({file}: {error})") from None
    if written is not None and written != _digest(tensors):
        raise Damaged(f"{where} is damaged ({file}: not as it was written)")
    return tensors


class ClientMemories:
    """The memories of all clients of a run, below one folder. `newest`: client -> the round of its newest file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest: dict[int, int] = {}

    def check(self, newest: Mapping[int, int]) -> None:
        """Read the files that a checkpoint goes with; Damaged names the first that is not as it was written."""
        for client, round in sorted(newest.items()):
            _verified(self.folder / str(client) / f"{round:06d}.safetensors")

    def commit(self, memory: MutableMapping[str, Tensor], client: int) -> None:
        """Write what the client has changed in its memory."""
        if isinstance(memory, ClientMemory) and memory.commit():
            self.newest[client] = memory.round

    def of(self, client: int, round: int) -> ClientMemory:
        """The memory of a client as it is before a round: also where that round asks it again, its first reply lost."""
        newest = self.newest.get(client)
        if newest is not None and newest >= round:  # what this round has written is not yet so
            newest = None
        return ClientMemory(self.folder / str(client), round, newest)

    def rewind(self, round: int) -> None:
        """Drop what was written after that round: a run that goes on from its checkpoint has not been there."""
        self.newest.clear()
        for folder in self.folder.glob("*"):
            for written, file in files_by_round(folder):
                if written > round:
                    file.unlink()
                elif folder.name.isdecimal():
                    self.newest[int(folder.name)] = written

    def prune(self, oldest: int) -> None:
        """See ClientMemory.prune."""
        for folder in self.folder.glob("*"):
            ClientMemory.prune(folder, oldest)
