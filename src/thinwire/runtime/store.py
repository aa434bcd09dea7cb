"""What must outlive a process: versions of the global weights, and what is private to each client."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from thinwire.wire import LazyTensors, raw
from thinwire.wire.payload import Spec


def version_of(tensors: Mapping[str, Tensor]) -> str:
    """The content hash (32 hex digits of sha256) of named tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()[:32]


def write_atomically(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


class VersionStore:
    """Versions of named tensors in a folder, addressed by content; only the `keep` newest stay."""

    def __init__(self, folder: Path, keep: int = 8) -> None:
        self.folder, self.keep = folder, keep

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep these tensors (they must not share memory); returns their version. Drops the oldest beyond the bound."""
        version = version_of(tensors)
        path = self._path(version)
        if path.exists():
            os.utime(path)
        else:
            write_atomically(path, tensors)
        for old in sorted(self.folder.glob("*.safetensors"), key=lambda p: (p.stat().st_mtime_ns, p.name))[
            : -self.keep
        ]:
            if old != path:
                old.unlink()
        return version

    def get(self, version: str) -> Mapping[str, Tensor] | None:
        """The tensors of a version, each read when asked for; None if it is not held (any more)."""
        path = self._path(version)
        if not re.fullmatch("[0-9a-f]{32}", version) or not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            specs = {name: Spec.of(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - not a mapping

        def read(name: str) -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        return LazyTensors(specs, read)

    def _path(self, version: str) -> Path:
        return self.folder / f"{version}.safetensors"


class ClientMemory(MutableMapping[str, Tensor]):
    """One client's own tensors: read from its newest file up to `round`, written to a new one by `commit`.

    A file a round, so that a run resumed from an earlier checkpoint finds the memory of that checkpoint.
    """

    def __init__(self, folder: Path, round: int) -> None:
        self.folder, self.round = folder, round
        self._tensors: dict[str, Tensor] | None = None
        self._changed = False

    def __getitem__(self, name: str) -> Tensor:
        return self._loaded()[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._loaded()[name] = tensor
        self._changed = True

    def __delitem__(self, name: str) -> None:
        del self._loaded()[name]
        self._changed = True

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def commit(self) -> None:
        """Write what was set in this round, if anything was."""
        if self._changed:
            write_atomically(self.folder / f"{self.round:06d}.safetensors", self._loaded())
            self._changed = False

    def _loaded(self) -> dict[str, Tensor]:
        if self._tensors is None:
            # Strictly before: a file of this very round is from a run that was cut off within it.
            files = [f for f in sorted(self.folder.glob("*.safetensors")) if int(f.stem) < self.round]
            self._tensors = load_file(files[-1]) if files else {}
        return self._tensors

    @staticmethod
    def prune(folder: Path, oldest: int) -> None:
        """Drop the files that no checkpoint from round `oldest` on can need."""
        files = [f for f in sorted(folder.glob("*.safetensors")) if int(f.stem) <= oldest]
        for file in files[:-1]:
            file.unlink()


class ClientMemories:
    """The memories of all clients of a run, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[int, ClientMemory] = {}

    def of(self, client: int, round: int) -> ClientMemory:
        """The memory of a client in a round: one object, however often the round asks that client."""
        if client not in self._open or self._open[client].round != round:
            self._open[client] = ClientMemory(self.folder / str(client), round)
        return self._open[client]

    def prune(self, oldest: int) -> None:
        """See ClientMemory.prune; also lets go of what is in memory."""
        self._open.clear()
        for folder in self.folder.glob("*"):
            ClientMemory.prune(folder, oldest)
