"""One tensor of all clients at a time, and of a large one some columns: what reads updates side by side.

In memory are ROOM bytes of it. A tensor that is larger is decoded once a client, to a file that is then read in
columns: a reply's own file cannot serve, for not every update lies in it as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pdist

Tensors = Mapping[str, Tensor]
ROOM = 1 << 22


class Read(Mapping[str, Tensor]):
    """Named tensors that are made when asked for, and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def wide(tensor: Tensor) -> Tensor:
    """On the CPU in float32, or in float64 where it is so already."""
    return tensor.detach().to("cpu", torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def change(tensors: Tensors, origin: Tensors, name: str) -> Tensor:
    """What an update changes in a tensor, of memory of its own."""
    found = wide(tensors[name])
    return found - wide(origin[name]) if name in origin else found.clone()


def norm(tensors: Tensors, origin: Tensors) -> float:
    """The length of what an update changes, all tensors together."""
    squares = (change(tensors, origin, name).square_().sum(dtype=torch.float64).item() for name in tensors)
    return float(np.sqrt(sum(squares)))


def shortened(tensors: Tensors, origin: Tensors, factor: float) -> Tensors:
    """The update with what it changes times a factor."""

    def read(name: str) -> Tensor:
        found = change(tensors, origin, name).mul_(factor)
        return found.add_(wide(origin[name])) if name in origin else found

    return Read(tensors, read)


def combined(
    updates: Sequence[Tensors], rule: Callable[[NDArray[Any]], NDArray[Any]], spool: Path | None
) -> dict[str, Tensor]:
    """Each tensor as a rule makes it of [clients, numbers], those that hold it; the rule may write to what it gets."""
    found: dict[str, Tensor] = {}
    held, room = _holders(updates), _room(len(updates))
    likes = {name: _like(updates[holders[0]], name) for name, holders in held.items()}
    for name in sorted(held, key=lambda name: -likes[name].numel()):  # a large one while little else is there
        made = torch.empty_like(likes[name], device="cpu")
        for start, block in _blocks([partial(_read, updates[i], name) for i in held[name]], made, room, spool):
            made.view(-1)[start : start + block.shape[1]] = torch.from_numpy(rule(block))
        found[name] = made
    return {name: found[name] for name in held}


def squared_distances(updates: Sequence[Tensors], origin: Tensors, spool: Path | None) -> NDArray[np.float64]:
    """|u_i - u_j|^2 of any two, all tensors together, float64 [clients, clients]; what one does not hold it leaves."""
    total, room = torch.zeros(len(updates) * (len(updates) - 1) // 2, dtype=torch.float64), _room(len(updates))
    for name, holders in _holders(updates).items():
        like = _like(updates[holders[0]], name)
        reads = [partial(torch.zeros, like.shape, dtype=like.dtype) for _ in updates]
        for i in holders:
            reads[i] = partial(change, updates[i], origin, name)
        for _, block in _blocks(reads, like, room, spool):
            total += pdist(torch.from_numpy(block).double()).square()  # exact where products would cancel
    found = np.zeros((len(updates), len(updates)))
    found[np.triu_indices(len(updates), 1)] = total.numpy()
    return found + found.T


def _holders(updates: Sequence[Tensors]) -> dict[str, list[int]]:
    """Name -> who holds such a tensor; to ask a table that is read lazily for a name would read it."""
    found: dict[str, list[int]] = {}
    for i, tensors in enumerate(updates):
        for name in tensors:
            found.setdefault(name, []).append(i)
    return found


def _read(tensors: Tensors, name: str) -> Tensor:
    return wide(tensors[name])


def _like(tensors: Tensors, name: str) -> Tensor:
    """The same without memory."""
    return torch.empty_like(_read(tensors, name), device="meta")


def _room(clients: int) -> NDArray[np.uint8]:
    """What all blocks share: made anew for each, between results that stay, they would leave holes in memory."""
    return np.empty(max(ROOM, 8 * clients), np.uint8)


def _blocks(
    reads: Sequence[Callable[[], Tensor]], like: Tensor, room: NDArray[np.uint8], spool: Path | None
) -> Iterator[tuple[int, NDArray[Any]]]:
    """(the first column, [clients, columns]) of tensors such as `like`, flattened; a block may be written to."""
    size, width = like.numel(), like.element_size()
    columns = min(size, len(room) // (width * len(reads)))
    whole = room[: len(reads) * columns * width].view(f"f{width}").reshape(len(reads), columns)
    if columns == size:
        for row, read in zip(whole, reads, strict=True):
            row[:] = read().flatten().numpy()
        yield 0, whole
        return
    with tempfile.TemporaryFile(dir=spool) as file:
        for read in reads:
            file.write(read().flatten().numpy().data.cast("B"))
        for start in range(0, size, columns):
            block = whole[:, : size - start]
            for i, row in enumerate(block):
                file.seek((i * size + start) * width)
                file.readinto(row.data.cast("B"))
            yield start, block
