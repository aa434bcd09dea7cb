"""What fuzzing has found, and honest inputs, once more: nothing but the errors that are documented."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from targets import TARGETS

HERE = Path(__file__).parent
SLOW = ("learnt", "replies", "broadcasts")  # which first train, or load what numba has compiled


def kept() -> Iterator[object]:
    for file in sorted((HERE / "corpus").glob("*/*")):
        marks = [pytest.mark.long] if file.parent.name in SLOW else []
        yield pytest.param(file, marks=marks, id=f"{file.parent.name}/{file.name}")


@pytest.mark.parametrize("file", list(kept()))
def test_what_was_found_is_refused_as_documented(file: Path) -> None:
    target = TARGETS[file.parent.name]
    with contextlib.suppress(target.errors):
        target.run(file.read_bytes())


def named() -> Iterator[object]:
    for name in TARGETS:
        marks = [pytest.mark.long] if name in SLOW else []
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(named()))
def test_honest_inputs_pass_and_their_mutations_raise_what_is_documented(name: str) -> None:
    if name == "envelope":
        pytest.importorskip("flwr")
    if name == "secure":
        pytest.importorskip("cryptography")
        pytest.importorskip("Crypto")
    target, draw, passed = TARGETS[name], random.Random(name), 0
    for seed in target.seeds():
        try:
            target.run(seed)
            passed += 1
        except target.errors:
            pass
        for _ in range(20):
            data = bytearray(seed)
            for _ in range(draw.randrange(1, 4)):
                at = draw.randrange(len(data))
                data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
                data = data or bytearray(1)
            with contextlib.suppress(target.errors):
                target.run(bytes(data))
    assert passed


def test_the_corpus_is_small() -> None:
    sizes = [file.stat().st_size for file in (HERE / "corpus").glob("*/*")]
    assert sizes
    assert sum(sizes) < 20_000
