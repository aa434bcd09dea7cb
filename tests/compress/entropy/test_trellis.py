"""Trellis-coded quantisation, held to exhaustive search and to the rate-distortion bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from thinwire.compress.entropy import trellis


def drawn(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)


def cosine(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize(("k", "width"), [(1, 1), (1, 2), (1, 3), (2, 1)])
def test_no_path_is_nearer(k: int, width: int) -> None:
    book, x = drawn(16, width), drawn(5 * width, seed=1)
    found = trellis.encode(x, book, k)
    distances = {
        path: float(np.square(trellis.decode(np.array(path, np.uint8), book, k) - x).sum())
        for path in itertools.product(range(1 << k), repeat=5)
    }
    assert distances[tuple(found.tolist())] == pytest.approx(min(distances.values()), rel=1e-5)


@pytest.mark.parametrize(("k", "width"), [(1, 4), (1, 2), (1, 1), (2, 1)])
def test_a_gaussian_comes_near_the_bound(k: int, width: int) -> None:
    bound = math.sqrt(1 - 4 ** (-k / width))
    book, x = drawn(256, width) * bound, drawn(12_288, seed=1)
    assert cosine(x, trellis.decode(trellis.encode(x, book, k), book, k)) > 0.92 * bound


def test_fitted_codewords_are_nearer() -> None:
    x = np.sign(drawn(1 << 15)) * np.float32(1)  # signs, which a Gaussian book does not fit
    book = drawn(256, 2) * np.float32(0.7)
    held = np.sign(drawn(1 << 13, seed=2))
    fitted = trellis.fit(x, book, 1, rounds=5)
    before, after = (cosine(held, trellis.decode(trellis.encode(held, b, 1), b, 1)) for b in (book, fitted))
    assert after > before + 0.01


def test_paths_are_independent() -> None:
    book, x = drawn(16, 2), drawn(2 * (trellis.STEPS + 10))
    whole = trellis.encode(x, book, 1)
    assert np.array_equal(whole[trellis.STEPS :], trellis.encode(x[2 * trellis.STEPS :], book, 1))
