"""What every codec is held to: only tensors out of any bytes, input that none takes, bits that never change."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from thinwire.streams import words


class Codec(Protocol):
    def encode(self, x: torch.Tensor, key: int) -> bytes: ...

    def decode(self, data: bytes, shape: Sequence[int], key: int) -> torch.Tensor: ...


def draw(law: str, count: int, seed: int = 0) -> torch.Tensor:
    """Float32 [count] of a law."""
    rng = np.random.default_rng(seed)
    laws = {
        "gauss": rng.standard_normal,
        "even": lambda n: rng.uniform(-1, 1, n),
        "t3": lambda n: rng.standard_t(3, n),
        "skewed": lambda n: np.exp(3 * rng.standard_normal(n)),
        "one": lambda n: np.r_[1.0, np.zeros(n - 1)],
        "two": lambda n: np.r_[1, 0.5, np.zeros(n - 2)],
    }
    return torch.from_numpy(laws[law](count).astype(np.float32))


def passed(codec: Codec, x: torch.Tensor, key: int = 1) -> torch.Tensor:
    """What is decoded of x."""
    return codec.decode(codec.encode(x, key), x.shape, key)


def left_over(x: torch.Tensor, y: torch.Tensor) -> float:
    """|x - y|^2 / |x|^2."""
    return float((x.double() - y.double()).square().sum() / x.double().square().sum())


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(x.double() @ y.double() / x.double().norm() / y.double().norm())


def spoilt(data: st.DataObject, good: bytes, most: int = 3, head: int = 0, cuts: Sequence[int] = range(-3, 4)) -> bytes:
    """An encoding with up to `most` of its bytes changed, of which the first `head` oftener, and cut or longer."""
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(0, most))):
        anywhere = st.integers(0, len(good) - 1)
        bad[data.draw(anywhere | st.integers(0, head - 1) if head else anywhere)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from(cuts))
    return bytes(bad[: len(bad) + cut] if cut < 0 else bad + bytes(cut))


def decoded_or_refused(codec: Codec, bad: bytes, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A finite tensor of that shape, or None after a ValueError; all else fails."""
    with contextlib.suppress(ValueError):
        found = codec.decode(bad, shape, 3)
        assert found.shape == shape
        assert found.isfinite().all()
        return found
    return None


def assert_takes_finite_float32_and_a_key(codec: Codec) -> None:
    for bad in (torch.tensor([1.0, float("nan")]), torch.tensor([-float("inf")])):
        with pytest.raises(ValueError, match="not finite"):
            codec.encode(bad, 0)
    for bad in (
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(3, device="meta"),
    ):
        with pytest.raises(ValueError, match="takes float32 on the CPU"):
            codec.encode(bad, 0)
    good = codec.encode(torch.zeros(3), 0)
    for key in (-1, 1 << 64):
        with pytest.raises(ValueError, match="key"):
            codec.encode(torch.zeros(3), key)
        with pytest.raises(ValueError, match="key"):
            codec.decode(good, (3,), key)


def assert_same_bits_everywhere(codec: Codec, count: int, digest: str) -> None:
    """On every machine and thread: the digest of the bytes and of what they decode to."""
    # numbers that no mathematical library has a hand in
    x = torch.from_numpy((words(7, [0], count)[0].view(np.int64).astype(np.float64) * 2.0**-70).astype(np.float32))
    data = codec.encode(x, 11)
    decoded = codec.decode(data, x.shape, 11).numpy().tobytes()
    assert hashlib.sha256(data + decoded).hexdigest()[:16] == digest
    with ThreadPoolExecutor(2) as pool:
        for other in pool.map(lambda _: codec.encode(x, 11), range(4)):
            assert other == data
        for found in pool.map(lambda _: codec.decode(data, x.shape, 11), range(4)):
            assert found.numpy().tobytes() == decoded
