"""Frames: what goes in comes out, in few bytes; all else is refused in a known way, and nothing is allocated for it."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.wire import (
    Corrupt,
    Frame,
    Header,
    LazyTensors,
    Malformed,
    Stale,
    TooLarge,
    WireError,
    decode,
    encode,
    frame,
    raw,
)
from thinwire.wire.payload import CODES, DTYPES


@dataclass(frozen=True)
class Everything:
    flag: bool
    count: int
    rate: float
    name: str
    blob: bytes
    counts: list[int]
    rates: list[float]
    names: list[str]
    weight: Tensor
    table: Mapping[str, Tensor]
    maybe_count: int | None
    maybe_rates: list[float] | None
    maybe_weight: Tensor | None
    maybe_table: dict[str, Tensor] | None


@dataclass(frozen=True)
class Small:
    seen: int
    scale: float
    weight: Tensor
    table: Mapping[str, Tensor]


@dataclass(frozen=True)
class Other:
    seen: int
    scale: float
    weight: Tensor
    table: Mapping[str, Tensor]


def everything(**changes: Any) -> Everything:
    filled = Everything(
        flag=True,
        count=-7,
        rate=0.1,
        name="Größe",
        blob=b"\x00\xff",
        counts=[0, -(2**63), 2**64 - 1],
        rates=[0.0, -0.0, float("inf"), float("nan"), 5e-324],
        names=["", "b", "a"],
        weight=torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        table={"z": torch.tensor(2.5), "a": torch.empty(0, 3), "é.weight": torch.tensor([True, False])},
        maybe_count=1,
        maybe_rates=[1.0],
        maybe_weight=torch.ones(1, dtype=torch.uint16),
        maybe_table={"one": torch.ones(2, 2, dtype=torch.int64)},
    )
    return dataclasses.replace(filled, **changes)


def small(weight: Tensor | None = None, table: Mapping[str, Tensor] | None = None) -> Small:
    return Small(3, 0.5, torch.zeros(2) if weight is None else weight, {} if table is None else table)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(raw(a)) == bytes(raw(b))


def assert_same(a: Any, b: Any) -> None:
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Tensor):
            assert same_tensor(left, right), field.name
        elif isinstance(left, Mapping):
            assert list(left) == list(right), field.name
            assert all(same_tensor(left[name], right[name]) for name in left), field.name
        else:
            assert repr(left) == repr(right), field.name  # NaN is like NaN, 1 is not like True


Send = Callable[..., Frame]


@pytest.fixture(scope="module", params=["bytes", "file"])
def send(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Send]:
    """`encode`, once in memory and once through a file."""
    folder = tmp_path_factory.mktemp("spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "SPOOL_ABOVE", -1 if request.param == "file" else 1 << 23)

        def one(payload: Any, **header: Any) -> Frame:
            before = len(list(folder.iterdir()))
            sent = encode(payload, spool=folder, **header)
            assert len(list(folder.iterdir())) - before == (request.param == "file")
            return sent

        yield one


# round trips


def test_every_kind_of_field_returns(send: Send) -> None:
    assert_same(everything(), decode(Everything, send(everything())))


def test_what_may_be_none_returns_as_none(send: Send) -> None:
    sent = everything(maybe_count=None, maybe_rates=None, maybe_weight=None, maybe_table=None)
    assert_same(sent, decode(Everything, send(sent)))


def test_zero_and_empty_are_not_none(send: Send) -> None:
    sent = everything(maybe_count=0, maybe_rates=[], maybe_weight=torch.empty(0), maybe_table={})
    got = decode(Everything, send(sent))
    assert_same(sent, got)
    assert got.maybe_count == 0
    assert got.maybe_rates == []
    assert got.maybe_weight is not None
    assert got.maybe_table is not None


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3), (1,) * 8], ids=str)
def test_every_dtype_and_shape_returns_bit_by_bit(send: Send, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(0, dtype, shape)
    got = decode(Small, send(small(tensor, {"t": tensor})))
    assert same_tensor(got.weight, tensor)
    assert same_tensor(got.table["t"], tensor)


def test_a_nan_keeps_its_payload(send: Send) -> None:
    odd = torch.tensor([0x7FC12345, 0xFF800001 - (1 << 32)], dtype=torch.int32).view(torch.float32)
    assert same_tensor(decode(Small, send(small(odd))).weight, odd)


def test_views_travel_as_what_they_show(send: Send) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    views = {
        "transposed": whole.T,
        "strided": whole[::2, 1::2],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "flipped": whole.flip(0),
        "parameter": torch.nn.Parameter(whole[1]),
    }
    sent = send(small(whole.T, views))
    got = decode(Small, sent)
    assert torch.equal(got.weight, whole.T)
    for name, view in views.items():
        assert torch.equal(got.table[name], view)
        assert not got.table[name].requires_grad
    assert len(sent) < 4 * (24 + 24 + 6 + 6 + 24 + 6) + 200  # a view costs what it shows, not what it looks into


def test_a_decoded_tensor_is_writable_and_owns_its_memory(send: Send) -> None:
    sent = send(small(torch.ones(3), {"t": torch.ones(3)}))
    got = decode(Small, sent)
    got.weight.add_(1)
    got.table["t"].add_(1)
    assert decode(Small, sent).weight.tolist() == [1, 1, 1]
    assert decode(Small, sent).table["t"].tolist() == [1, 1, 1]


def test_the_header_returns(send: Send) -> None:
    sent = send(small(), run=2**64 - 1, round=3, client=-1, held="abc")
    header = sent.header()
    assert header == Header("Small", 2**64 - 1, 3, -1, "abc", [3, 0.5, [0, 2], {}], len(sent) - 4 * 2 - 8)
    assert sent.header() is header  # parsed once
    assert send(small()).header().held is None


def test_a_plain_payload_has_no_buffers(send: Send) -> None:
    assert decode(Stale, send(Stale(None))) == Stale(None)
    assert decode(Stale, send(Stale("v"))) == Stale("v")
    assert len(send(Stale(None))) < 32


def random_tensor(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    bits = np.random.Generator(np.random.PCG64(seed)).integers(256, size=count, dtype=np.uint8)
    if dtype == torch.bool:
        bits &= 1
    return torch.from_numpy(bits).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    tensor = random_tensor(draw(st.integers(0, 9)), draw(st.sampled_from(list(DTYPES.values()))), shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


def tables() -> st.SearchStrategy[dict[str, Tensor]]:
    return st.dictionaries(st.text(max_size=4), tensors(), max_size=3)


INTEGERS = st.integers(-(2**63), 2**64 - 1)
PAYLOADS = st.builds(
    Everything,
    flag=st.booleans(),
    count=INTEGERS,
    rate=st.floats(),
    name=st.text(max_size=5),
    blob=st.binary(max_size=5),
    counts=st.lists(INTEGERS, max_size=3),
    rates=st.lists(st.floats(), max_size=3),
    names=st.lists(st.text(max_size=3), max_size=3),
    weight=tensors(),
    table=tables(),
    maybe_count=st.none() | INTEGERS,
    maybe_rates=st.none() | st.lists(st.floats(), max_size=2),
    maybe_weight=st.none() | tensors(),
    maybe_table=st.none() | tables(),
)


@given(payload=PAYLOADS)
@settings(max_examples=40, deadline=None)
def test_any_payload_returns(send: Send, payload: Everything) -> None:
    sent = send(payload, run=5, held="v")
    assert_same(payload, decode(Everything, sent, len(sent)))
    assert bytes(sent) == bytes(encode(payload, run=5, held="v"))
    sent.remove()


# lengths, files, laziness


def test_the_length_is_the_bytes_that_were_written(send: Send) -> None:
    sent = send(everything())
    assert len(sent) == len(bytes(sent))


def test_a_frame_is_read_in_any_pieces(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "CHUNK", 100)
    sent = send(everything())
    whole = bytes(sent)
    assert b"".join(sent.chunks()) == whole
    assert b"".join(sent.read(start, 7) for start in range(0, len(sent), 7)) == whole
    assert sent.read(len(sent) - 3, 100) == whole[-3:]


def test_a_frame_is_handed_over_with_its_file(send: Send, tmp_path: Path) -> None:
    sent = send(everything())
    whole, header = bytes(sent), sent.header()
    sent.move_to(tmp_path / "kept.frame")
    sent.remove()  # what it was moved to is not its own
    assert [path.name for path in tmp_path.iterdir()] == ["kept.frame"]
    assert (tmp_path / "kept.frame").read_bytes() == whole == bytes(sent)
    again = Frame.load(tmp_path / "kept.frame")
    assert repr(again.header()) == repr(header)  # a NaN is in it
    again.remove()
    assert bytes(again) == whole
    (tmp_path / "kept.frame").unlink()
    if len(whole) < frame.SPOOL_ABOVE:
        assert bytes(again) == whole  # a small one is in memory
    else:
        with pytest.raises(FileNotFoundError):
            bytes(again)


def test_a_frame_in_a_file_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = encode(everything(), run=1, round=2, client=3, held="v")
    monkeypatch.setattr(frame, "SPOOL_ABOVE", -1)
    in_file = encode(everything(), run=1, round=2, client=3, held="v", spool=tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == bytes(in_memory) == bytes(in_file)
    in_file.remove()
    in_file.remove()  # twice does no harm
    assert list(tmp_path.iterdir()) == []


def test_only_buffers_over_the_limit_go_through_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "SPOOL_ABOVE", 8)
    encode(small(torch.zeros(2)), spool=tmp_path)
    assert list(tmp_path.iterdir()) == []
    encode(small(torch.zeros(3)), spool=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert isinstance(decode(Small, encode(small(table={"t": torch.zeros(3)}))).table, dict)  # no folder, no file


def test_named_tensors_of_a_file_are_lazy_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "SPOOL_ABOVE", -1)
    names = ["z", "a", "m.10", "m.9"]
    sent = encode(small(table={name: torch.full((2,), i) for i, name in enumerate(names)}), spool=tmp_path)
    table = decode(Small, sent).table
    assert isinstance(table, LazyTensors)
    assert list(table) == names
    assert [tensor.tolist() for tensor in table.values()] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert table["a"] is not table["a"]  # read anew, never kept
    again = encode(Small(3, 0.5, torch.zeros(2), table), spool=tmp_path)  # what is lazy can be sent on
    assert bytes(again) == bytes(sent)
    sent.remove()
    with pytest.raises(Malformed, match="cannot be read"):
        table["a"]


def test_a_large_file_is_checked_and_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "SPOOL_ABOVE", 0)
    monkeypatch.setattr(frame, "CHUNK", 1 << 10)
    sent = encode(small(table={f"t{i}": torch.full((1 << 14,), float(i)) for i in range(16)}), spool=tmp_path)
    tracemalloc.start()
    try:
        got = decode(Small, sent)
        assert [got.table[name][0].item() for name in got.table] == list(range(16))
        assert tracemalloc.get_traced_memory()[1] < 200_000  # a tensor is 64 KiB, the frame 1 MiB
    finally:
        tracemalloc.stop()


def test_the_format_does_not_change_unnoticed() -> None:
    sent = encode(
        Small(
            3,
            0.5,
            torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.bfloat16),
            {"b": torch.tensor(-1, dtype=torch.int16), "a": torch.empty(0, 2), "é": torch.tensor([True, False])},
        ),
        run=0x0123456789ABCDEF,
        round=2,
        client=-1,
        held="v1",
    )
    golden = [
        "74687701 35000000",  # magic, version 1, length of the header
        "96 a5536d616c6c cf0123456789abcdef 02 ff a27631",  # six parts: "Small", run, round, client, "v1"
        "94 03 cb3fe0000000000000",  # four fields: 3, 0.5
        "93010103 83 a162 9106 a161 93000002 a2c3a9 920902",  # bf16 (1, 3), {b: i16 (), a: f32 (0, 2), é: bool (2)}
        "803f 00c0 003f  ffff  01 00",  # the elements
        "c58ea1992c137d8b",  # xxh3-64
    ]
    assert bytes(sent).hex() == "".join(golden).replace(" ", "")


def test_the_dtype_codes_are_frozen() -> None:
    assert [str(DTYPES[code]).removeprefix("torch.") for code in range(12)] == [
        *("float32", "bfloat16", "float16", "float64", "uint8", "int8"),
        *("int16", "int32", "int64", "bool", "uint16", "uint32"),
    ]
    assert all(CODES[dtype] == code for code, dtype in DTYPES.items())


def test_a_header_is_small() -> None:
    @dataclass(frozen=True)
    class Up:
        a: Tensor
        b: Tensor
        examples: int
        steps: int

    sent = encode(
        Up(torch.zeros(3000, 4000, dtype=torch.int8), torch.zeros(3000), 10**6, 10**4),
        run=2**63,
        round=10**4,
        client=10**5,
        held="0" * 32,
    )
    assert len(sent) - 3000 * 4000 - 4 * 3000 < 100


# what cannot be sent


@pytest.mark.parametrize(
    "change",
    [
        {"flag": 1},
        {"flag": None},
        {"count": True},
        {"count": 1.0},
        {"count": np.int64(1)},
        {"count": 2**64},
        {"count": -(2**63) - 1},
        {"counts": [2**64]},
        {"rate": 1},
        {"rate": np.float32(1)},
        {"rate": torch.tensor(1.0)},
        {"name": b"bytes"},
        {"name": "\ud800"},
        {"blob": "text"},
        {"blob": bytearray(b"x")},
        {"counts": (1, 2)},
        {"counts": [1, 2.0]},
        {"counts": [True]},
        {"rates": [1]},
        {"names": ["a", None]},
        {"names": "abc"},
        {"weight": None},
        {"weight": [1.0]},
        {"weight": np.zeros(2)},
        {"weight": torch.zeros(2, dtype=torch.complex64)},
        {"weight": torch.zeros((1,) * 9)},
        {"table": None},
        {"table": [torch.zeros(1)]},
        {"table": {"a": 1.0}},
        {"table": {1: torch.zeros(1)}},
        {"table": {"\ud800": torch.zeros(1)}},
        {"maybe_count": 1.5},
        {"maybe_weight": 3},
        {"maybe_table": torch.zeros(2)},
    ],
    ids=lambda change: f"{next(iter(change))}-{type(next(iter(change.values()))).__name__}",
)
def test_a_value_of_another_type_is_not_sent(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        encode(everything(**change))


def test_a_sparse_tensor_is_not_sent() -> None:
    with pytest.raises(TypeError, match="sparse"):
        encode(small(torch.eye(2).to_sparse()))


def test_a_header_over_its_cap_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "MAX_HEADER", 1000)
    with pytest.raises(TypeError, match="over 1000"):
        encode(Stale("x" * 1000))


def test_only_payloads_are_sent_and_expected() -> None:
    with pytest.raises(TypeError, match="not a payload"):
        encode({"weight": torch.zeros(1)})
    with pytest.raises(TypeError, match="not a payload"):
        decode(dict, Frame(seal(["dict", 0, 0, 0, None, []])))


# what is refused


def seal(header: Any, buffers: bytes = b"") -> bytes:
    """A frame with a right length and checksum around any header; bytes are taken as they are."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    body = b"thw\x01" + len(packed).to_bytes(4, "little") + packed + buffers
    return body + xxhash.xxh3_64(body).intdigest().to_bytes(8, "little")


def reseal(body: bytes) -> bytes:
    return body[:-8] + xxhash.xxh3_64(body[:-8]).intdigest().to_bytes(8, "little")


def header(*fields: Any, kind: Any = "Small") -> list[Any]:
    return [kind, 0, 0, 0, None, list(fields)]


def try_all(data: bytes, folder: Path | None = None) -> int:
    """Ask bytes for their header and decode them as several classes; how many take them. All else is a WireError."""
    taken = 0
    offers = [Frame(data)]
    if folder is not None:
        (folder / "offer").write_bytes(data)
        offers.append(Frame.in_file(folder / "offer", len(data)))
    for offer in offers:
        with contextlib.suppress(WireError):
            offer.header()
        for kind in (Small, Everything, Stale):
            try:
                got = decode(kind, offer)
            except WireError:
                continue
            taken += 1
            for field in dataclasses.fields(got):  # the lazy ones too
                dict(value) if isinstance(value := getattr(got, field.name), Mapping) else value
    return taken


GOOD = seal(header(3, 0.5, [0, 2], {"t": [1, 1]}), b"\0" * 10)


def test_the_hand_made_frame_is_a_good_one() -> None:
    assert_same(decode(Small, Frame(GOOD)), Small(3, 0.5, torch.zeros(2), {"t": torch.zeros(1, dtype=torch.bfloat16)}))
    assert try_all(GOOD) == 1


TENSOR = [0, 2]
HOSTILE: dict[str, tuple[Any, ...]] = {
    "2**40 elements": (3, 0.5, [0, 2**40], {}),
    "2**40 elements, named": (3, 0.5, [4, 0], {"t": [3, 2**40]}),
    "a product beyond 64 bits": (3, 0.5, [0, 2**32, 2**32, 2**32], {}),
    "empty with huge strides": (3, 0.5, [0, 0, 2**40, 2**40], {}),
    "empty with a huge size": (3, 0.5, [0, 2**63, 0], {}),
    "empty with 2**64 - 1": (3, 0.5, [0, 0], {"t": [0, 0, 2**64 - 1]}),
    "named empty with huge strides": (3, 0.5, [0, 0], {"t": [9, 2**62, 2**62, 0]}),
    "negative size": (3, 0.5, [0, -2], {}),
    "two negative sizes": (3, 0.5, [0, -1, -2], {}),
    "float size": (3, 0.5, [0, 2.0], {}),
    "NaN size": (3, 0.5, [0, float("nan")], {}),
    "bool size": (3, 0.5, [0, True, 2], {}),
    "text size": (3, 0.5, [0, "2"], {}),
    "nested size": (3, 0.5, [0, [2]], {}),
    "too many dimensions": (3, 0.5, [0, *[1] * 9], {}),
    "unknown dtype": (3, 0.5, [12, 2], {}),
    "negative dtype": (3, 0.5, [-1, 2], {}),
    "dtype by name": (3, 0.5, ["float32", 2], {}),
    "no dtype": (3, 0.5, [], {}),
    "tensor is None": (3, 0.5, None, {}),
    "tensor is a number": (3, 0.5, 2, {}),
    "tensor is a table": (3, 0.5, {"0": 2}, {}),
    "table is None": (3, 0.5, TENSOR, None),
    "table is a list": (3, 0.5, TENSOR, [TENSOR]),
    "names are bytes": (3, 0.5, TENSOR, {b"t": [0, 0]}),
    "names are numbers": (3, 0.5, TENSOR, {1: [0, 0]}),
    "named None": (3, 0.5, TENSOR, {"t": None}),
    "one field less": (3, 0.5, TENSOR),
    "one field more": (3, 0.5, TENSOR, {}, None),
    "no fields": (),
    "int is None": (None, 0.5, TENSOR, {}),
    "int is a bool": (True, 0.5, TENSOR, {}),
    "int is a float": (3.0, 0.5, TENSOR, {}),
    "float is an int": (3, 1, TENSOR, {}),
    "float is text": (3, "nan", TENSOR, {}),
    "extension": (msgpack.ExtType(5, b"x"), 0.5, TENSOR, {}),
    "time": (msgpack.Timestamp(1, 1), 0.5, TENSOR, {}),
    "extension in a shape": (3, 0.5, [0, msgpack.ExtType(5, b"x")], {}),
    "extension as a tensor": (3, 0.5, msgpack.ExtType(0, b"\2"), {}),
}


def assert_refused_without_allocating(data: bytes, *, by: type[WireError] = Malformed) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(by):
            decode(Small, Frame(data))
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 4 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_hostile_fields_are_refused(fields: tuple[Any, ...], tmp_path: Path) -> None:
    data = seal(header(*fields), b"\0" * 8)
    assert_refused_without_allocating(data)
    assert try_all(data, tmp_path) == 0


NESTED = b"\x91" * 100_000 + b"\xc0"
HEADERS: dict[str, Any] = {
    "nothing": b"",
    "not a list": {"kind": "Small"},
    "five parts": header()[:5],
    "seven parts": [*header(3, 0.5, TENSOR, {}), 0],
    "kind is bytes": header(3, 0.5, TENSOR, {}, kind=b"Small"),
    "kind is a number": header(3, 0.5, TENSOR, {}, kind=1),
    "round is a bool": ["Small", 0, True, 0, None, [3, 0.5, TENSOR, {}]],
    "client is None": ["Small", 0, 0, None, None, [3, 0.5, TENSOR, {}]],
    "held is a number": ["Small", 0, 0, 0, 1, [3, 0.5, TENSOR, {}]],
    "fields are a table": ["Small", 0, 0, 0, None, {"0": 3}],
    "an extension": msgpack.ExtType(1, b"x"),
    "never used byte": b"\xc1",
    "two headers": msgpack.packb(header(3, 0.5, TENSOR, {})) * 2,
    "cut short": msgpack.packb(header(3, 0.5, TENSOR, {}))[:-1],
    "text that is not UTF-8": b"\x96\xa5Sm\xffll\0\0\0\xc0\x90",
    "a time beyond all": b"\xc7\x0c\xff" + b"\xff" * 12,
    "nested deeply": NESTED,
    "tables nested deeply": b"\x81\xa0" * 100_000 + b"\xc0",
    "nested in the fields": msgpack.packb(header())[:-1] + b"\x94" + b"\x91" * 400 + b"\xc0" * 4,
    "a list of 2**32 - 1": b"\xdd\xff\xff\xff\xff",
    "a table of 2**32 - 1": b"\xdf\xff\xff\xff\xff",
    "bytes of 2**32 - 1": b"\xc6\xff\xff\xff\xff",
    "lists that are not there": b"\xdd\x00\x00\x10\x00" * 500 + b"\xc0" * 2000,
    "a key that is a list": b"\x96\xa5Small\0\0\0\xc0\x91\x81\x90\x01",
}


@pytest.mark.parametrize("packed", HEADERS.values(), ids=HEADERS)
def test_hostile_headers_are_refused(packed: Any, tmp_path: Path) -> None:
    data = seal(packed, b"\0" * 8)
    assert_refused_without_allocating(data)
    assert try_all(data, tmp_path) == 0


def test_a_name_that_comes_twice_does_no_harm(tmp_path: Path) -> None:
    twice = b"\x82\xa1t\x92\x00\x01\xa1t\x92\x00\x01"
    packed = msgpack.packb(header(3, 0.5, [0, 0]))
    packed = packed.replace(b"\x93\x03\xcb", b"\x94\x03\xcb") + twice
    assert try_all(seal(packed, b"\0" * 8), tmp_path) == 0  # the second tensor's bytes belong to nobody


def test_floats_that_are_not_numbers_are_well_formed() -> None:
    got = decode(Small, Frame(seal(header(3, float("nan"), [0, 1], {}), np.float32("nan").tobytes())))
    assert np.isnan(got.scale)
    assert got.weight.isnan().all()


@pytest.mark.parametrize("length", [2**31, 2**32 - 1, (1 << 23) + 1])
def test_a_header_longer_than_its_cap_is_too_large(length: int) -> None:
    data = reseal(GOOD[:4] + length.to_bytes(4, "little") + GOOD[8:])
    assert_refused_without_allocating(data, by=TooLarge)
    with pytest.raises(TooLarge):
        Frame(data).header()


@pytest.mark.parametrize("length", [0, 1, len(GOOD) - 15, len(GOOD), 1 << 23])
def test_a_header_of_another_length_is_malformed(length: int) -> None:
    data = reseal(GOOD[:4] + length.to_bytes(4, "little") + GOOD[8:])
    assert_refused_without_allocating(data)
    with pytest.raises(Malformed):
        Frame(data).header()


@pytest.mark.parametrize("nothing", [b"\x90", b"\x80"])
def test_a_header_of_more_lists_than_any_model_has_tensors_is_not_built(nothing: bytes) -> None:
    count = 2 * frame.MAX_LISTS
    start = msgpack.packb(["Small", 0, 0, 0, None])
    packed = bytes([start[0] + 1]) + start[1:] + b"\xdd" + count.to_bytes(4, "big") + count * nothing
    with pytest.raises(Malformed):
        Frame(seal(packed)).header()


def test_a_receiver_that_knows_the_model_reads_no_longer_header(send: Send) -> None:
    names = ["a", "b" * 50]
    sent = send(Small(1, 0.5, torch.zeros(3), {name: torch.zeros(2, 3) for name in names}))
    room = frame.header_room(Small, names)
    assert room < 5_000
    with pytest.raises(TooLarge, match="a header of"):
        sent.header(8)
    assert sent.header(room) == sent.header()
    with pytest.raises(TooLarge, match="a header of"):
        sent.header(8)  # the cap is the caller's, also where the header is known
    assert frame.header_room(Everything, names) == frame.MAX_HEADER  # it has texts and bytes of its own


@pytest.mark.parametrize("held", ["x" * 129, "a\nb", "caf\u00e9"])
def test_a_version_that_is_none_is_malformed(held: str) -> None:
    parts = header()
    parts[4] = held
    with pytest.raises(Malformed):
        Frame(seal(parts)).header()


def test_a_frame_over_the_cap_is_too_large_before_it_is_read(send: Send, tmp_path: Path) -> None:
    sent = send(small())
    decode(Small, sent, max_bytes=len(sent))
    with pytest.raises(TooLarge, match="over the cap"):
        decode(Small, sent, max_bytes=len(sent) - 1)
    with pytest.raises(TooLarge):
        decode(Small, Frame.in_file(tmp_path / "not there", 2**40))


def test_another_kind_is_malformed(send: Send) -> None:
    with pytest.raises(Malformed, match="'Small' where 'Other'"):
        decode(Other, send(small()))


def test_another_version_is_malformed() -> None:
    with pytest.raises(Malformed, match="version"):
        decode(Small, Frame(reseal(b"thw\x02" + GOOD[4:])))


def test_buffers_must_be_all_there_and_no_more() -> None:
    fields = header(3, 0.5, [0, 2], {"t": [1, 1]})
    for size in (0, 7, 8, 9, 11, 100):
        with pytest.raises(Malformed):
            decode(Small, Frame(seal(fields, b"\0" * size)))


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "frame"
    for position in range(len(GOOD)):
        bad = bytearray(GOOD)
        bad[position] ^= 1 << position % 8
        with pytest.raises(Corrupt):
            decode(Small, Frame(bytes(bad)))
        path.write_bytes(bad)
        with pytest.raises(Corrupt):
            decode(Small, Frame.in_file(path, len(bad)))


def test_every_truncation_and_extension_is_noticed(tmp_path: Path) -> None:
    for size in range(len(GOOD)):
        assert try_all(GOOD[:size], tmp_path) == 0
        assert try_all(reseal(GOOD[:size]) if size > 8 else b"", tmp_path) == 0
    for more in (b"\0", b"\0" * 8, GOOD):
        assert try_all(GOOD + more, tmp_path) == 0
        assert try_all(reseal(GOOD + more), tmp_path) == 0


def test_a_file_that_is_not_what_it_was_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "frame"
    for content in (None, b"", GOOD[:-1], GOOD + b"\0"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(Malformed):
            decode(Small, Frame.in_file(path, len(GOOD)))
    path.unlink()
    with pytest.raises(Malformed):
        Frame.in_file(path, len(GOOD)).header()
    with pytest.raises(Malformed):
        Frame.in_file(tmp_path, len(GOOD)).header()  # a folder


# fuzzing

ATOMS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 9, 11, 12, 255, -1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
    | INTEGERS
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=6)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=9))
)
TREES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner),
    max_leaves=8,
)
SIZES = st.lists(ATOMS, max_size=10) | st.lists(st.integers(0, 12), max_size=9)
GOOD_FIELDS = [3, 0.5, [0, 2], {"t": [1, 1]}]


@st.composite
def hostile_frames(draw: st.DrawFn) -> bytes:
    """Frames that are right but for some of their parts, the checksum always right."""
    if draw(st.integers(0, 9)) == 0:
        return seal(draw(TREES | st.binary(max_size=40)), draw(st.binary(max_size=20)))
    fields: list[Any] = list(GOOD_FIELDS)
    for _ in range(draw(st.integers(1, 2))):
        fields[draw(st.integers(0, 3))] = draw(TREES | SIZES | st.dictionaries(st.text(max_size=3), SIZES, max_size=3))
    if draw(st.integers(0, 5)) == 0:
        fields = draw(st.lists(TREES, max_size=15))
    parts: list[Any] = header(*fields, kind=draw(st.sampled_from(["Small", "Everything", "Stale"])))
    if draw(st.integers(0, 5)) == 0:
        parts[draw(st.integers(0, 5))] = draw(TREES)
    return seal(parts, draw(st.binary(max_size=20) | st.integers(0, 64).map(bytes)))


def one_mutation(generator: np.random.Generator, data: bytes) -> bytes:
    """Some bytes flipped, cut out, repeated or set, and in most cases a right checksum again."""
    bad = bytearray(data)
    for _ in range(int(generator.integers(1, 5))):
        at = int(generator.integers(len(bad))) if bad else 0
        match int(generator.integers(5)):
            case 0 if bad:
                bad[at] ^= 1 << int(generator.integers(8))
            case 1 if bad:
                bad[at] = int(generator.choice([0, 1, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xDC, 0xDD, 0xDF, 0xFF]))
            case 2:
                del bad[at : at + int(generator.integers(1, 9))]
            case 3:
                bad[at:at] = generator.bytes(int(generator.integers(1, 9)))
            case _:
                del bad[at:]
    bad = bytearray(reseal(bytes(bad)) if len(bad) > 8 and generator.random() < 0.9 else bad)
    if len(bad) > 16 and generator.random() < 0.5:  # keep the header's length right, so that more of it is reached
        bad[:4] = b"thw\x01"
        bad[4:8] = min(int.from_bytes(bad[4:8], "little"), len(bad) - 16).to_bytes(4, "little")
        bad = bytearray(reseal(bytes(bad)))
    return bytes(bad)


def mutate(seed: int, count: int, folder: Path | None = None) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    sources = [GOOD, bytes(encode(everything())), bytes(encode(Stale("v")))]
    tracemalloc.start()
    try:
        for i in range(count):
            try_all(one_mutation(generator, sources[i % 3]), folder)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@given(data=hostile_frames())
@settings(max_examples=200, deadline=None)
def test_hostile_frames_raise_wire_errors_only(data: bytes) -> None:
    try_all(data)


@given(data=st.binary(max_size=64) | st.binary(max_size=48).map(lambda rest: b"thw\x01" + rest))
@settings(max_examples=50, deadline=None)
def test_noise_raises_wire_errors_only(data: bytes) -> None:
    assert try_all(data) == 0
    with pytest.raises(WireError):
        Frame(data[:7]).header()


def test_mutated_frames_raise_wire_errors_only(tmp_path: Path) -> None:
    mutate(0, 1500)
    mutate(1, 150, tmp_path)


@pytest.mark.long
@given(data=hostile_frames())
@settings(max_examples=5_000, deadline=None)
def test_many_hostile_frames_raise_wire_errors_only(data: bytes) -> None:
    try_all(data)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_many_mutated_frames_raise_wire_errors_only(seed: int, tmp_path: Path) -> None:
    mutate(100 + seed, 20_000)
    mutate(200 + seed, 1_000, tmp_path)
