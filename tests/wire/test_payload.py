"""Payload classes: which fields can travel, what the header has of a tensor, lazy tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import Tensor

from thinwire.wire import LazyTensors, Malformed, Stale, encode
from thinwire.wire.payload import DTYPES, Spec, fields_of, fits, specs_of


def payload_with(hint: Any) -> type:
    return dataclasses.make_dataclass("Made", [("x", hint)], frozen=True)


@pytest.mark.parametrize("form", [bool, int, float, str, bytes, list[int], list[float], list[str], Tensor], ids=str)
def test_the_listed_forms_travel_with_and_without_none(form: Any) -> None:
    for hint, optional in ((form, False), (form | None, True), (None | form, True), (Optional[form], True)):  # noqa: UP045
        (field,) = fields_of(payload_with(hint))
        assert (field.name, field.form, field.optional) == ("x", form, optional)


@pytest.mark.parametrize("form", [Mapping[str, Tensor], dict[str, Tensor]], ids=str)
def test_named_tensors_travel_with_and_without_none(form: Any) -> None:
    for hint, optional in ((form, False), (form | None, True)):
        (field,) = fields_of(payload_with(hint))
        assert (field.many_tensors, field.one_tensor, field.optional) == (True, False, optional)


@pytest.mark.parametrize(
    "hint",
    [
        *(complex, object, Any, None, dict, list, tuple, set, bytearray, Mapping, np.ndarray, Stale),
        *(list[bool], list[bytes], list[Tensor], list[list[int]], tuple[int, ...], set[int], frozenset[str]),
        *(dict[str, int], dict[int, Tensor], Mapping[str, Tensor | None], dict[str, dict[str, Tensor]]),
        *(int | str, int | float | None, Tensor | dict[str, Tensor]),
    ],
    ids=str,
)
def test_other_types_cannot_travel(hint: Any) -> None:
    with pytest.raises(TypeError, match=r"Made\.x has a type that cannot travel"):
        fields_of(payload_with(hint))
    with pytest.raises(TypeError, match="cannot travel"):
        encode(payload_with(hint)(x=None))


@pytest.mark.parametrize(
    "payload", [int, dict, object(), Stale(None), None], ids=["int", "dict", "object", "stale", "none"]
)
def test_what_is_not_a_dataclass_is_no_payload(payload: Any) -> None:
    with pytest.raises(TypeError, match="not a payload"):
        fields_of(payload)


def test_fields_keep_their_order_through_inheritance() -> None:
    @dataclass(frozen=True)
    class Base:
        z: int
        a: int

    @dataclass(frozen=True)
    class Longer(Base):
        m: int

    assert [field.name for field in fields_of(Longer)] == ["z", "a", "m"]


def test_plain_values_fit_their_own_type_only() -> None:
    values = {bool: True, int: 1, float: 1.0, str: "1", bytes: b"1", list[int]: [1], list[float]: [1.0]}
    for hint in values:
        (field,) = fields_of(payload_with(hint))
        assert [value for value in values.values() if fits(value, field)] == [values[hint]], hint
        assert not fits(None, field)
        assert fits(None, dataclasses.replace(field, optional=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_spec_is_what_a_header_says_of_a_tensor(dtype: torch.dtype) -> None:
    for shape in ((), (0,), (2, 3)):
        tensor = torch.zeros(shape, dtype=dtype)
        spec = Spec.of(tensor)
        assert Spec.parse(spec.packed()) == spec == Spec(dtype, shape)
        assert spec.nbytes == tensor.nbytes


@pytest.mark.parametrize(
    "packed", [None, 0, "0", (0, 1), [], [99], [0, -1], [0, 1.0], [0, True], [True], [0, None], [0] * 10, [0, 0, 2**60]]
)
def test_a_spec_that_is_none_is_malformed(packed: Any) -> None:
    with pytest.raises(Malformed):
        Spec.parse(packed)


def test_lazy_tensors_read_what_is_asked_for_and_keep_nothing() -> None:
    asked = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return torch.ones(2)

    lazy = LazyTensors({name: Spec(torch.float32, (2,)) for name in "zam"}, read)
    assert list(lazy) == ["z", "a", "m"]
    assert len(lazy) == 3
    assert specs_of(lazy) is lazy.specs  # without reading
    assert asked == []
    assert lazy["a"] is not lazy["a"]
    assert asked == ["a", "a"]
    with pytest.raises(KeyError):
        lazy["b"]
    assert asked == ["a", "a"]
    assert list(dict(lazy)) == ["z", "a", "m"]
