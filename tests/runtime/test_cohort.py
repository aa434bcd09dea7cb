"""Cohorts: who takes part, from the round and a key alone."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from thinwire.keys import Key
from thinwire.runtime.cohort import All, Cohort, Cyclic, Uniform, cohort_of

CLIENTS = range(5)


def at(segments: list[All | Uniform | Cyclic], round: int, seed: int = 0) -> tuple[int, ...]:
    return cohort_of(segments, CLIENTS, round, Key.root(seed).fold("cohort", round))


def test_all_are_all() -> None:
    assert at([All()], 1) == at([All()], 99) == (0, 1, 2, 3, 4)


def test_cyclic_goes_round() -> None:
    assert [at([Cyclic()], round) for round in range(1, 8)] == [(0,), (1,), (2,), (3,), (4,), (0,), (1,)]


def test_uniform_picks_distinct_clients_in_order() -> None:
    for round in range(1, 30):
        picked = at([Uniform(n=3)], round)
        assert len(picked) == 3
        assert list(picked) == sorted(set(picked))
        assert set(picked) <= set(CLIENTS)


def test_uniform_is_uniform() -> None:
    pairs = [at([Uniform(n=2)], round) for round in range(1, 1001)]
    counts = [pairs.count(pair) for pair in sorted(set(pairs))]
    assert len(counts) == 10
    assert all(60 < count < 140 for count in counts)


@pytest.mark.parametrize("n", [5, 6, 1000])
def test_more_than_there_are_is_all(n: int) -> None:
    assert at([Uniform(n=n)], 1) == tuple(CLIENTS)


def test_the_key_decides_and_nothing_else() -> None:
    def run(seed: int) -> list[tuple[int, ...]]:
        return [at([Uniform(n=2)], round, seed) for round in range(1, 20)]

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_clients_need_not_be_numbered_from_zero() -> None:
    key = Key.root(0)
    assert cohort_of([Cyclic()], [7, 3], 2, key) == (3,)
    assert cohort_of([All()], [7, 3], 2, key) == (7, 3)
    assert cohort_of([Uniform(n=2)], [7, 3], 2, key) == (3, 7)


def test_segments_follow_each_other_and_each_counts_its_own_turns() -> None:
    segments = [All(rounds=2), Cyclic(rounds=3), Uniform(n=1, rounds=1), Cyclic()]
    picked = [at(segments, round) for round in range(1, 10)]
    assert picked[:2] == [tuple(CLIENTS)] * 2
    assert picked[2:5] == [(0,), (1,), (2,)]
    assert len(picked[5]) == 1
    assert picked[6:] == [(0,), (1,), (2,)]


def test_the_last_segment_goes_on_for_ever() -> None:
    assert at([All(rounds=1), Cyclic(rounds=2)], 9) == (2,)  # turn 7 of five clients


def test_a_segment_without_an_end_hides_what_follows() -> None:
    assert at([Cyclic(), All()], 100) == (4,)


def test_a_cohort_is_data() -> None:
    cohort = TypeAdapter(Cohort)
    assert cohort.validate_python({"kind": "uniform", "n": 3, "rounds": 2}) == Uniform(n=3, rounds=2)
    assert cohort.validate_python({"kind": "cyclic"}) == Cyclic()
    for wrong in ({"kind": "some"}, {"kind": "uniform"}, {"kind": "uniform", "n": 0}, {"kind": "all", "n": 1}):
        with pytest.raises(ValidationError):
            cohort.validate_python(wrong)
    with pytest.raises(ValidationError):
        All(rounds=0)
