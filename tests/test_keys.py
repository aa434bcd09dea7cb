"""Keys: the same words everywhere, different ones for different paths, and no other generator is touched."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.keys import Key, reduced

ROOT = Key.root(0)
PARTS = st.lists(st.integers() | st.text(max_size=6), max_size=4).map(tuple)


def test_the_words_are_shake_128_of_the_path() -> None:
    key = Key.root(7).fold("round", 3, "client", -1)
    digest = hashlib.shake_128(b"i1:7/s5:round/i1:3/s6:client/i2:-1").digest(24)
    assert key.words(3).tobytes() == digest
    assert key.word() == int.from_bytes(digest[:8], "little")


def test_golden_values() -> None:
    key = Key.root(7).fold("round", 3, "client", -1)
    assert key.words(3).tolist() == [8225597297984926259, 3137375306306384149, 3372911609473050769]
    assert key.integers(1000, 5).tolist() == [445, 170, 182, 812, 846]
    assert key.uniform(2).tolist() == [0.4459105230233076, 0.17007745614998782]
    assert key.permutation(8).tolist() == [7, 1, 2, 0, 6, 5, 3, 4]


@given(parts=PARTS, short=st.integers(0, 9), more=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_longer_draw_begins_with_the_shorter(parts: tuple[int | str, ...], short: int, more: int) -> None:
    key = ROOT.fold(*parts)
    assert key.words(short + more)[:short].tolist() == key.words(short).tolist()
    assert key.integers(7, short + more)[:short].tolist() == key.integers(7, short).tolist()
    assert key.uniform(short + more)[:short].tolist() == key.uniform(short).tolist()


@given(left=PARTS, right=PARTS)
@settings(max_examples=100, deadline=None)
def test_two_paths_share_nothing(left: tuple[int | str, ...], right: tuple[int | str, ...]) -> None:
    a, b = ROOT.fold(*left), ROOT.fold(*right)
    assert (a == b) == (left == right) == (a.word() == b.word())
    assert (hash(a) == hash(b)) or left != right


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((1,), ("1",)),
        (("a", "b"), ("ab",)),
        (("a", "b"), ("b", "a")),
        (("a", ""), ("a",)),
        (("a/s1:b",), ("a", "b")),
        ((1, 23), (12, 3)),
        ((-1,), (1,)),
        ((), (0,)),
        (("é",), ("e\u0301",)),
    ],
)
def test_paths_that_look_alike_differ(left: tuple[int | str, ...], right: tuple[int | str, ...]) -> None:
    assert ROOT.fold(*left).word() != ROOT.fold(*right).word()


def test_folding_goes_step_by_step_or_at_once() -> None:
    assert ROOT.fold("a", 1).fold("b") == ROOT.fold("a").fold(1, "b") == Key((0, "a", 1, "b"))
    assert ROOT.fold() == ROOT
    assert {ROOT.fold("a"): 1}[Key.root(0).fold("a")] == 1
    assert Key.root(0).word() != Key.root(1).word()


def test_integers_keep_their_bound_and_are_uniform() -> None:
    drawn = ROOT.fold("dice").integers(6, 6000)
    assert drawn.dtype == np.int64
    counts = np.bincount(drawn, minlength=6)
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 5 * np.sqrt(6000 * 5 / 36)
    assert ROOT.integers(1, 5).tolist() == [0] * 5
    top = ROOT.integers(2**32 - 1, 2000)
    assert 0 <= top.min() < 2**24
    assert 2**32 - 2**24 < top.max() < 2**32 - 1


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.integers(1, 2**63 - 1) | st.integers(1, 2**33))
def test_words_are_reduced_in_exact_integers(words: list[int], bound: int) -> None:
    expected = [word * bound >> 64 for word in words]
    assert reduced(np.array(words, np.uint64), bound).tolist() == expected


@pytest.mark.parametrize("bound", [0, -1, 2**63])
def test_a_bound_that_integers_cannot_keep_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match="bound"):
        ROOT.integers(bound, 1)


def test_uniform_is_uniform_on_the_half_open_interval() -> None:
    drawn = ROOT.fold("uniform").uniform(10_000)
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(np.histogram(drawn, bins=10, range=(0, 1))[0] - 1000).max() < 5 * np.sqrt(900)
    assert (drawn * 2.0**53 == np.floor(drawn * 2.0**53)).all()


def test_permutations_are_permutations_and_uniform() -> None:
    assert sorted(ROOT.permutation(100).tolist()) == list(range(100))
    assert ROOT.permutation(0).tolist() == []
    assert ROOT.permutation(1).tolist() == [0]
    seen = [tuple(ROOT.fold(i).permutation(3).tolist()) for i in range(1200)]
    counts = [seen.count(order) for order in sorted(set(seen))]
    assert len(counts) == 6
    assert max(abs(count - 200) for count in counts) < 5 * np.sqrt(200)


def test_a_numpy_generator_repeats() -> None:
    first, second = ROOT.fold("law").numpy(), ROOT.fold("law").numpy()
    assert first.dirichlet([1.0, 2.0]).tolist() == second.dirichlet([1.0, 2.0]).tolist()
    assert ROOT.fold("other").numpy().random() != ROOT.fold("law").numpy().random()


def test_the_global_generators_stay_untouched() -> None:
    def states() -> list[bytes]:
        return [
            repr(random.getstate()).encode(),
            np.random.get_state()[1].tobytes(),  # noqa: NPY002 - this is what must not change
            torch.get_rng_state().numpy().tobytes(),
        ]

    before = states()
    for key in (ROOT, ROOT.fold("x")):
        key.words(5), key.word(), key.integers(5, 5), key.uniform(5), key.permutation(5), key.numpy().random(5)
    assert states() == before
    random.random()
    assert states() != before
