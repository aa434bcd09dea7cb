"""Versions of the global weights as a method's halves see them: named tensors by a hash of their content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Versions(Protocol):
    """Content-addressed named tensors: a bounded number of versions of the global weights."""

    def put(self, tensors: Mapping[str, Tensor]) -> str: ...

    def get(self, version: str) -> Mapping[str, Tensor] | None: ...


class Trial(NamedTuple):
    """The versions of a state that is only tried: none is kept."""

    known: Versions

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """A name that no version has."""
        return "0" * 32

    def get(self, version: str) -> Mapping[str, Tensor] | None:
        """A version that is held."""
        return self.known.get(version)
