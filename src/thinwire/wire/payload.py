"""Payloads: frozen dataclasses of plain values and tensors, the only things that travel.

A field is one of: bool, int, float, str, bytes, list[int], list[float], list[str], Tensor, Mapping[str, Tensor], or one
of these with None. The order of the fields is the order on the wire. A field that a class was given after frames of it
had been kept is `late`: the last ones of them are not written where they are None, so old frames stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinwire.wire.errors import Malformed

# Frozen: a code is never given another meaning, only new ones are added.
DTYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.bfloat16,
    2: torch.float16,
    3: torch.float64,
    4: torch.uint8,
    5: torch.int8,
    6: torch.int16,
    7: torch.int32,
    8: torch.int64,
    9: torch.bool,
    10: torch.uint16,
    11: torch.uint32,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_DIMENSIONS = 8
MAX_STRIDE = 1 << 59  # elements; torch counts bytes in 63 bits
LATE = {"late": True}  # the metadata of a field that came after frames without it had been kept
PLAIN: tuple[Any, ...] = (bool, int, float, str, bytes, list[int], list[float], list[str])


@dataclass(frozen=True)
class Stale:
    """A client's answer to a `Down` that builds on a version it does not hold."""

    held: str | None


class Spec(NamedTuple):
    """What the header has of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """The spec of a tensor in memory; TypeError for one that cannot travel."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"not a tensor: {tensor!r:.60}")
        if tensor.dtype not in CODES or tensor.layout != torch.strided or tensor.dim() > MAX_DIMENSIONS:
            raise TypeError(f"a tensor of {tensor.dtype}, {tensor.layout}, {tensor.dim()} dimensions cannot travel")
        return cls(tensor.dtype, tuple(tensor.shape))

    @classmethod
    def parse(cls, packed: Any) -> Spec:
        """The inverse of `packed`; Malformed for anything else."""
        if not isinstance(packed, list) or {*map(type, packed)} != {int} or min(packed) < 0:
            raise Malformed("a tensor's entry in the header is not a list of sizes")
        if not 1 <= len(packed) <= 1 + MAX_DIMENSIONS or packed[0] not in DTYPES:
            raise Malformed("a tensor's entry in the header has no known dtype")
        if math.prod([n or 1 for n in packed[1:]]) > MAX_STRIDE:  # an empty tensor too has strides
            raise Malformed("a tensor's entry in the header has sizes that no tensor can have")
        return cls(DTYPES[packed[0]], tuple(packed[1:]))

    def packed(self) -> list[int]:
        """The form in the header: the dtype's code, then the shape."""
        return [CODES[self.dtype], *self.shape]

    @property
    def nbytes(self) -> int:
        """Bytes of the raw buffer."""
        return math.prod(self.shape, start=self.dtype.itemsize)


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors that are read when asked for and not kept: a large frame never stands in memory as a whole."""

    def __init__(self, specs: dict[str, Spec], read: Callable[[str], Tensor]) -> None:
        self.specs = specs
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def kind_of(payload: type) -> str:
    """What frames call a payload class: its KIND where it was once named otherwise, else its name."""
    return str(payload.__dict__.get("KIND", payload.__name__))


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Name -> spec, without reading tensors that are not in memory where that can be had."""
    if isinstance(tensors, LazyTensors):
        return tensors.specs
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise TypeError(f"not a table of tensors by name: {tensors!r:.60}")
    return {name: Spec.of(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Field:
    """One field of a payload: its name, its form (a plain type, Tensor, or Mapping), whether None is allowed."""

    name: str
    form: Any
    optional: bool
    late: bool = False

    @property
    def one_tensor(self) -> bool:
        return self.form is Tensor

    @property
    def many_tensors(self) -> bool:
        return self.form is Mapping


def fields_of(payload: type) -> tuple[Field, ...]:
    """The fields of a payload class in order; TypeError if it is not one, or a field has a type that cannot travel."""
    if payload not in _FIELDS:
        _FIELDS[payload] = _read_fields(payload)
    return _FIELDS[payload]


_FIELDS: dict[type, tuple[Field, ...]] = {}


def _read_fields(payload: type) -> tuple[Field, ...]:
    if not dataclasses.is_dataclass(payload) or not isinstance(payload, type):
        raise TypeError(f"{payload!r} is not a payload: it is not a dataclass")
    hints = typing.get_type_hints(payload)
    return tuple(
        dataclasses.replace(_field(payload, f.name, hints[f.name]), late=f.metadata.get("late", False))
        for f in dataclasses.fields(payload)
    )


def _field(payload: type, name: str, hint: Any) -> Field:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        optional = len(options) < len(typing.get_args(hint))
        hint = options[0] if len(options) == 1 else None
    if hint is Tensor or hint in PLAIN:
        return Field(name, hint, optional)
    if typing.get_origin(hint) in (dict, Mapping) and typing.get_args(hint) == (str, Tensor):
        return Field(name, Mapping, optional)
    raise TypeError(f"{payload.__name__}.{name} has a type that cannot travel")


def fits(value: Any, field: Field) -> bool:
    """Whether a decoded plain value is of the field's type; ints are not bools, and floats are not ints."""
    if value is None:
        return field.optional
    if field.form in (bool, int, float, str, bytes):
        return type(value) is field.form
    (inner,) = typing.get_args(field.form)
    return isinstance(value, list) and all(type(item) is inner for item in value)
