"""What takes bytes from elsewhere, each as a function of bytes with the only errors that it may raise.

A target's first bytes choose a class or a shape, the rest goes in as it is; frames get the checksum that fits, or a
fuzzer would stop there. `seeds` are honest inputs. What comes out whole must be what the documents say: an assertion
that fails is a find as any other exception is.
"""

from __future__ import annotations

import dataclasses
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import xxhash
from torch import Tensor

from thinwire import wire
from thinwire.compress import catalogue
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.eden import Eden
from thinwire.compress.codecs.factors import Factors
from thinwire.compress.codecs.powersgd import PowerSgd
from thinwire.compress.codecs.qsgd import Qsgd
from thinwire.compress.codecs.sketch import Sketch
from thinwire.compress.codecs.ternary import Ternary
from thinwire.compress.codecs.topk import TopK
from thinwire.compress.entropy import adaptive, integers, static, trellis
from thinwire.compress.exact import coarse, ulp
from thinwire.compress.learned import codebooks, components
from thinwire.compress.learned.autoencoder import AutoEncoder, Latents, tables_of
from thinwire.compress.learned.lora_image import Image
from thinwire.federation import channel
from thinwire.methods import METHODS
from thinwire.runtime.payloads import Hello, Ready, Scores
from thinwire.wire.legal import check_report
from thinwire.wire.payload import fields_of

SHAPES = ((24, 16), (7,), (1,), (3, 5, 2), (65,))
KEY = 7
LARGEST = 1 << 20  # bytes of a frame


@dataclass(frozen=True)
class Target:
    """`run` takes the bytes, and raises nothing but `errors`; `share` is its part of all executions."""

    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    errors: tuple[type[Exception], ...]
    share: float = 1.0


# ---- frames


def payloads() -> list[type]:
    """All classes that travel."""
    methods = METHODS.values()
    classes = [cls for method in methods for cls in (method.Down, method.Up, method.State)]
    return list(dict.fromkeys([*classes, wire.Stale, Hello, Ready, Scores]))


def filled(payload: type) -> Any:
    """A payload with something in every field."""
    plain = {bool: True, int: 3, float: 0.5, str: "north", bytes: b"\1\2\3"}
    plain |= {list[int]: [1, 2], list[float]: [0.5, -1.0], list[str]: ["a", "b"]}
    values: dict[str, Any] = {}
    for field in fields_of(payload):
        if field.one_tensor:
            values[field.name] = torch.arange(6, dtype=torch.int16).reshape(2, 3)
        elif field.many_tensors:
            values[field.name] = {"w": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.bfloat16)}
        else:
            values[field.name] = plain[field.form]
    return payload(**values)


def sealed(body: bytes) -> bytes:
    """A frame's bytes with the checksum that fits."""
    return body + xxhash.xxh3_64_digest(body)[::-1]


def frames(data: bytes) -> None:
    """The header and decode, of every class."""
    classes = payloads()
    choice, body = data[0] if data else 0, data[1:]
    frame = wire.Frame(body if choice & 0x80 else sealed(body))
    frame.header()
    found = wire.decode(classes[choice % 0x80 % len(classes)], frame, LARGEST)
    assert len(wire.encode(found)) <= len(frame) + 64, "what was decoded is larger than its frame"


def frame_seeds() -> list[bytes]:
    """A whole frame of each class."""
    made = [wire.encode(filled(cls), run=1, round=2, client=3, held="0" * 32) for cls in payloads()]
    return [bytes([i]) + bytes(frame)[:-8] for i, frame in enumerate(made)]


def headers(data: bytes) -> None:
    """A header by itself."""
    frame = wire.Frame(sealed(wire.frame.MAGIC + len(data).to_bytes(4, "little") + data))
    frame.header()
    wire.decode(wire.Stale, frame, LARGEST)


def header_seeds() -> list[bytes]:
    """Honest ones, nested ones, and what announces more than is there."""
    honest = msgpack.packb(["Stale", 1, 2, 3, "0" * 32, [None]])
    table = msgpack.packb(["Trained", 1, 2, 3, None, [{"w": [0, 2, 2], "b": [1, 3]}, 5, 0.5]])
    return [honest, table, b"\x90" * 64, b"\x96\xa5Stale\1\2\3\xc0\x91\xdd\xff\xff\xff\xff", b"\x91" * 1100]


# ---- the federation's channel and envelope


class Link:
    """A socket that gives these bytes, then ends."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def recv_into(self, view: memoryview) -> int:
        """See socket."""
        return self.file.readinto(view)


class Kept(list[bytes]):
    """A socket that keeps what is written."""

    def sendall(self, data: bytes) -> None:
        """See socket."""
        self.append(data)


def channels(data: bytes) -> None:
    """The question of a site's Flower process to its worker."""
    if len(data) >= 12 and int.from_bytes(data[:4], "little") > len(data):
        data = (len(data) - 12).to_bytes(4, "little") + data[4:]  # or most inputs end before their table
    table, body = channel.receive(Link(data))  # type: ignore[arg-type]
    assert isinstance(table, dict)
    assert isinstance(body, bytes)


def channel_seeds() -> list[bytes]:
    """A question, an answer, an empty one."""
    found = []
    for table, body in (({"transfer": "0" * 16, "offset": 0, "total": 9, "room": 1024}, b"123456789"), ({}, b"")):
        link = Kept()
        channel.send(link, table, body)  # type: ignore[arg-type]
        found.append(b"".join(link))
    return found


def envelopes(data: bytes) -> None:
    """A message of the engine; what the engine itself refuses does not reach us."""
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    from thinwire.federation.engine import of
    from thinwire.federation.envelope import unpack

    try:
        proto = Proto()
        proto.ParseFromString(data)
        content = recorddict_from_proto(proto)
    except Exception:
        return
    piece, about = unpack(content)
    assert isinstance(piece, bytes)
    of(about, "offset")
    of(about, "transfer", str)


def envelope_seeds() -> list[bytes]:
    """What `pack` makes."""
    from flwr.common.serde import recorddict_to_proto

    from thinwire.federation.envelope import pack

    about = {"offset": 0, "total": 3, "transfer": "0" * 16, "rate": 0.5}
    return [recorddict_to_proto(pack(piece, **about)).SerializeToString() for piece in (b"abc", b"")]


# ---- codecs


def update(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Numbers as a change of weights has them."""
    draw = np.random.Generator(np.random.PCG64(seed)).standard_normal(math.prod(shape)).astype(np.float32)
    return torch.from_numpy(draw * 1e-3).reshape(tuple(shape))


def code(made: Sequence[Any], shapes: Sequence[tuple[int, ...]] = SHAPES) -> Target:
    """The decoding of codecs behind one interface: the first byte chooses one, the second a shape."""

    def run(data: bytes) -> None:
        choice = data[:2].ljust(2, b"\0")
        shape = shapes[choice[1] % len(shapes)]
        found = made[choice[0] % len(made)].decode(data[2:], shape, KEY)
        assert (tuple(found.shape), found.dtype) == (shape, torch.float32)
        assert bool(torch.isfinite(found).all()), "decoded to what is not finite"

    def seeds() -> list[bytes]:
        pairs = [(i, j) for i in range(len(made)) for j in range(len(shapes))]
        return [bytes([i, j]) + bytes(made[i].encode(update(shapes[j]), KEY)) for i, j in pairs]

    return Target(run, seeds, (ValueError,))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def olds(choice: int) -> tuple[torch.dtype, tuple[int, ...], Tensor | None]:
    """What a difference is decoded to and from."""
    dtype, shape = DTYPES[choice % 3], SHAPES[choice // 6 % len(SHAPES)]
    return dtype, shape, update(shape, 1).to(dtype) * 100 if choice // 3 % 2 else None


def ulps(data: bytes) -> None:
    """Lossless differences."""
    dtype, shape, old = olds(data[0] if data else 0)
    found = ulp.decode(data[1:], old, dtype, shape)
    assert (tuple(found.shape), found.dtype) == (shape, dtype)


def ulp_seeds() -> list[bytes]:
    """Each dtype, of nothing and of old weights."""
    made = []
    for choice in range(6 * len(SHAPES)):
        dtype, shape, old = olds(choice)
        new = (update(shape, 1) * 100 + update(shape) * 10).to(dtype)
        made.append(bytes([choice]) + ulp.encode(new, old))
    return made


COUNTS = (0, 1, 7, 384)


def packed(data: bytes) -> None:
    """Integers under zstandard."""
    count = COUNTS[(data[0] if data else 0) % len(COUNTS)]
    assert integers.unpack(data[1:], count).shape == (count,)


def packed_seeds() -> list[bytes]:
    """Narrow and wide ones."""
    draw = np.random.Generator(np.random.PCG64(0))
    wide = [draw.integers(-9, 9, n) * (1 << 8 * i) for i, n in enumerate(COUNTS)]
    return [bytes([i]) + integers.pack(values.astype(np.int64)) for i, values in enumerate(wide)]


def some_symbols(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Symbols below 16, most of them small."""
    return np.minimum(np.random.Generator(np.random.PCG64(0)).geometric(0.5, count) - 1, 15).astype(np.uint8)


def counts(data: bytes) -> None:
    """Symbols under shares that travel."""
    count = COUNTS[(data[0] if data else 0) % len(COUNTS)]
    assert static.decode(data[1:], count).shape == (count,)


def contexts(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Three tables in turn."""
    return (np.arange(count) % 3).astype(np.uint8)


def symbolic(data: bytes) -> None:
    """Symbols under tables that learn."""
    count = COUNTS[(data[0] if data else 0) % len(COUNTS)]
    assert adaptive.decode(data[1:], contexts(count), 3).shape == (count,)


BLOCKS = Blocks(4, 64)


def coarsely(data: bytes) -> None:
    """Rounded weights, of nothing and of old weights."""
    old = update((384,), 1) if data[:1] > b"\x7f" else None
    scales, codes = coarse.decode(data[1:], BLOCKS, old, 384)
    BLOCKS.values(scales, codes, (384,))


def coarse_seeds() -> list[bytes]:
    """Both."""
    scales, codes = BLOCKS.rounded(update((384,), 1) + update((384,)), KEY)
    return [
        bytes([255 * (old is not None)]) + coarse.encode(scales, codes, BLOCKS, old)
        for old in (None, update((384,), 1))
    ]


def paths(data: bytes) -> None:
    """A trellis' path: any is one."""
    book = np.linspace(-1, 1, 256, dtype=np.float32).reshape(256, 1)
    found = trellis.decode(np.frombuffer(data, np.uint8) & np.uint8(3), book, 2)
    assert found.shape == (len(data),)


@cache
def image() -> Image:
    """Where the factors of a small LoRA lie."""
    return Image.packed({f"{i}.{side}": (16, 128) if side == "a" else (128, 16) for i in range(4) for side in "ab"})


def learnt() -> Target:
    """The codecs that need tables."""

    @cache
    def both() -> tuple[Any, ...]:
        at = image()
        tables = tables_of(AutoEncoder.drawn(0), [update((at.height, at.width))], torch.ones(1))
        return (components.Components(at, 4 * at.count // 32, codebooks.untrained()), Latents(at, tables))

    def run(data: bytes) -> None:
        made = both()[(data[0] if data else 0) % 2]
        found = made.decode(data[1:], (image().height, image().width), KEY)
        assert bool(torch.isfinite(found).all()), "decoded to what is not finite"

    def seeds() -> list[bytes]:
        x = update((image().height, image().width))
        return [bytes([i]) + made.encode(x, KEY) for i, made in enumerate(both())]

    return Target(run, seeds, (ValueError,), 0.02)


# ---- whole replies and broadcasts, of every configuration that the conformance tests have


@dataclass(frozen=True)
class Standing:
    """A federation after its first round: what a reply or a broadcast of the second meets."""

    method: Any
    federation: Any
    state: bytes
    down: bytes
    up: bytes


@cache
def standings() -> tuple[Standing, ...]:
    """One for each row of the conformance tests. Takes a minute."""
    from federation import Federation
    from rows import ROWS, net_for, opened

    folder = Path(tempfile.mkdtemp(prefix="thinwire-fuzz-"))
    nets = opened(folder / "model")
    found = []
    for name, (method, *_) in ROWS.items():
        quick = method.model_copy(update={"steps": 1, "batch_size": 2})
        federation = Federation(quick, net_for(name, nets), folder / name, rounds=2, sizes=(4, 4, 4)).run(1)
        federation.round = 2
        down = quick.broadcast(federation.state, federation.server(2, (0, 1, 2)), 0, None)
        up = quick.client_update(down, federation.client(0, 2))
        packed = [wire.encode(payload, run=1, round=2, client=0) for payload in (federation.state, down, up)]
        found.append(Standing(quick, federation, *packed))
    return tuple(found)


NUMBERS = (0, 1, -1, 255, 10**6, -(2**31), 2**32, 2**63 - 1, -(2**63), 2**64 - 1)
RATES = (0.0, -1.0, 0.5, 1e-300, 6e4, 3e38, 1e300, -1e308, math.inf, math.nan)
TEXTS = ("", "0" * 32, "/../../../escape", "x" * 1000, "\x1b[2J\n")


def changed(payload: Any, data: bytes) -> Any:
    """An honest payload with fields replaced as the bytes say: three choose the field, what becomes of it, and how."""
    for field_at, how, what in zip(data[::3], data[1::3], data[2::3], strict=False):
        field = fields_of(type(payload))[field_at % len(fields_of(type(payload)))]
        value = replaced(getattr(payload, field.name), field, how, what)
        payload = dataclasses.replace(payload, **{field.name: value})
    return payload


def replaced(value: Any, field: Any, how: int, what: int) -> Any:
    """Another value of that field."""
    if field.optional and how % 8 == 7:
        return None
    if field.one_tensor and value is not None:
        return distorted(value, how, what)
    if field.many_tensors and value:
        names = list(value)
        name = names[what % len(names)]
        if how % 5 == 0:
            return {other: tensor for other, tensor in value.items() if other != name}
        if how % 5 == 1:
            return {**value, "lm_head.weight": torch.ones(2, 2)}
        return {**value, name: distorted(value[name], how // 5, what)}
    choices = {int: NUMBERS, float: RATES, str: TEXTS, bytes: (b"", b"\0" * 64), bool: (False, True)}
    if field.form in choices:
        return choices[field.form][what % len(choices[field.form])]
    (inner,) = getattr(field.form, "__args__", (None,))[:1]
    if inner not in choices or not isinstance(value, list):
        return value
    return [[], [*value, choices[inner][what % len(choices[inner])]], value * 3, value[1:]][how % 4]


def distorted(tensor: Tensor, how: int, what: int) -> Tensor:
    """A tensor with other numbers, or of another shape or dtype."""
    kinds = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float64, torch.bool)
    number = RATES[what % len(RATES)] if tensor.is_floating_point() else (0, 1, 2, 127, 63)[what % 5]
    if how % 6 == 0:
        return torch.full_like(tensor, number)
    if how % 6 == 1:
        other = tensor.clone()
        other.view(-1)[what % max(1, tensor.numel()) : what % max(1, tensor.numel()) + 1] = number
        return other
    if how % 6 == 2:
        return tensor.reshape(-1)[: what % (tensor.numel() + 1)]
    if how % 6 == 3:
        return tensor.nan_to_num().to(kinds[what % len(kinds)])
    return tensor[None] if how % 6 == 4 else torch.cat([tensor.reshape(-1)] * 2)


def sealed_or_changed(of: type, frame: wire.Frame, data: bytes) -> wire.Frame:
    """A frame of these bytes, or the honest one with its payload changed as they say."""
    if data[:1] < b"\x80":
        return wire.Frame(sealed(data[1:]))
    header = frame.header()
    try:
        payload: Any = changed(wire.decode(of, frame), data[1:31])
        return wire.encode(payload, run=header.run, round=header.round, client=header.client)
    except (TypeError, RuntimeError, OverflowError):  # no sender could make it either
        return wire.Frame(b"")


def replies(data: bytes) -> None:
    """The header, decode, check, and the mean of this one reply, whose metrics must be numbers."""
    at = standings()[(data[0] if data else 0) % len(standings())]
    frame = sealed_or_changed(at.method.Up, at.up, data[1:])
    frame.header()
    up = wire.decode(at.method.Up, frame, LARGEST)
    state = wire.decode(at.method.State, at.state)
    check_report(up)
    at.method.check(state, 0, up)
    try:
        state, metrics = at.method.aggregate(state, at.federation.server(2, (0, 1, 2)), iter([(0, up)]))
    except Exception as error:
        raise AssertionError(f"what `check` let pass did not go into the mean: {error!r}") from error
    assert all(math.isfinite(value) for value in metrics.values()), f"metrics that are no numbers: {metrics}"
    for field in dataclasses.fields(state):
        for tensor in tensors_of(getattr(state, field.name)):
            assert bool(torch.isfinite(tensor).all()), f"a state that is not finite: {field.name}"


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a field."""
    for tensor in value.values() if isinstance(value, Mapping) else [value]:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            yield tensor


def broadcasts(data: bytes) -> None:
    """A client, seen from outside, is given a frame of a hub that means ill."""
    from thinwire.runtime.endpoint import serve

    at = standings()[(data[0] if data else 0) % len(standings())]
    frame = sealed_or_changed(at.method.Down, at.down, data[1:])
    serve(at.method, frame, at.federation.client(0, 2), None, LARGEST)


def standing_seeds(what: str) -> Callable[[], list[bytes]]:
    """The honest reply or broadcast of each configuration, as bytes where it is small, and to be changed."""

    def seeds() -> list[bytes]:
        small = [bytes([i, 0]) + getattr(at, what)[:-8] for i, at in enumerate(standings())]
        return [seed for seed in small if len(seed) < 5000] + [
            bytes([i, 128, 0, 0, 0]) for i in range(len(standings()))
        ]

    return seeds


# ---- the questions of a secure sum, to a client


@cache
def questions() -> tuple[Any, list[tuple[str, bytes, int]]]:
    """A federation, and the frames of a round under masks: the action, the frame and its client, as they came."""
    from federation import Federation, tiny_net
    from secured import Quick

    from thinwire.privacy.secure import Secure
    from thinwire.runtime.secure import SecureRound

    folder = Path(tempfile.mkdtemp(prefix="thinwire-fuzz-"))
    (folder / "model").mkdir()
    method = Quick(seeds=64, steps=2, batch_size=2, shared=True)
    asked: list[tuple[str, bytes, int]] = []

    def noted(action: str, answer: Any) -> Any:
        def answered(method: Any, frame: wire.Frame, client: Any, spool: Path | None = None) -> wire.Frame:
            asked.append((action, bytes(frame), client.id))
            return answer(method, frame, client, spool)

        return answered

    federation = Federation(
        method,
        tiny_net(folder / "model"),
        folder,
        rounds=2,
        sizes=(4, 4, 4, 4),
        actions={name: noted(name, answer) for name, answer in masked().actions.items()},
        function=SecureRound(Secure(examples=16)),
    ).run(1)
    return federation, asked


def masked() -> Any:
    """Clients whose secrets are the same in every execution."""
    from thinwire.privacy.secure import Secure
    from thinwire.runtime.masked import MaskedClients

    numbers = iter(range(1, 1 << 20))
    return MaskedClients(
        Secure(examples=16), random=lambda size: next(numbers).to_bytes(4, "little") * (size // 4) + b"0" * (size % 4)
    )


def secure(data: bytes) -> None:
    """What comes before is honest, then client 0 is asked what the bytes make of an honest question."""
    from thinwire.runtime.payloads import Invite, Peers, Remaining, Task

    federation, asked = questions()
    places = [i for i, (_, _, client) in enumerate(asked) if client == 0]
    place, clients = places[(data[0] if data else 0) % len(places)], masked()
    for action, frame, client in asked[:place]:
        clients.actions[action](federation.method, wire.Frame(frame), federation.client(client, 1))
    action, frame, _ = asked[place]
    of = {"keys": Invite, "shares": Peers, "train": Task, "unmask": Remaining}[action]
    question = sealed_or_changed(of, wire.Frame(frame), data[1:])
    if question.header().client == 0:  # as the endpoint sees to it
        clients.actions[action](federation.method, question, federation.client(0, 1))


def secure_seeds() -> list[bytes]:
    """Each honest question as bytes, and to be changed."""
    own = [frame for _, frame, client in questions()[1] if client == 0]
    return [bytes([i, 0]) + frame[:-8] for i, frame in enumerate(own)] + [
        bytes([i, 128, field, 0, 0]) for i in range(len(own)) for field in range(5)
    ]


WIRE = (wire.WireError,)
VALUE = (ValueError,)
TARGETS: dict[str, Target] = {
    "frames": Target(frames, frame_seeds, WIRE, 3.0),
    "headers": Target(headers, header_seeds, WIRE, 3.0),
    "channel": Target(channels, channel_seeds, (ConnectionError,)),
    "envelope": Target(envelopes, envelope_seeds, VALUE, 0.3),
    "ulp": Target(ulps, ulp_seeds, VALUE),
    "blocks": code([Blocks(bits, 64) for bits in (8, 7, 5, 4, 2, 1)]),
    "factors": code([Factors(2, bits) for bits in (8, 4, 2)]),
    "eden": code([Eden(bits) for bits in (0.5, 1, 2, 3, 4)]),
    "topk": code([TopK(0.1, 64, bits) for bits in (2, 4, 8, 16)]),
    "qsgd": code([Qsgd(1, 64), Qsgd(7, 128)]),
    "signs": code([catalogue.Part(Blocks(1, 64), share) for share in (1.0, 0.5)]),
    "ternary": code([Ternary(0.1, 64), Ternary(0.5), catalogue.Part(Ternary(1), 0.3)]),
    "sketch": code([Sketch(1), Sketch(0.3)]),
    "lowrank": code([PowerSgd(2), PowerSgd(1)], ((24, 16), (7, 3), (3, 65))),
    "plain": code([catalogue.Plain()]),
    "integers": Target(packed, packed_seeds, VALUE),
    "counted": Target(
        counts, lambda: [bytes([i]) + static.encode(some_symbols(n)) for i, n in enumerate(COUNTS)], VALUE
    ),
    "symbols": Target(
        symbolic,
        lambda: [bytes([i]) + adaptive.encode(some_symbols(n), contexts(n), 3) for i, n in enumerate(COUNTS)],
        VALUE,
    ),
    "coarse": Target(coarsely, coarse_seeds, VALUE),
    "trellis": Target(paths, lambda: [bytes(range(64))], VALUE, 0.2),
    "learnt": learnt(),
    "secure": Target(secure, secure_seeds, WIRE, 0.02),
    "replies": Target(replies, standing_seeds("up"), WIRE, 0.3),
    "broadcasts": Target(broadcasts, standing_seeds("down"), WIRE, 0.02),
}
