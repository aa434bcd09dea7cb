"""Partitions: nothing lost, nothing twice, the same for the same key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_rows

from thinwire.data.errors import DataError
from thinwire.data.partition import Clients, by_column, by_size, by_task, dirichlet, holdout, iid
from thinwire.data.rows import Row
from thinwire.keys import Key

SEEDS = st.integers(0, 2**32)


def labelled(labels: Sequence[Any]) -> list[Row]:
    return [Row({"label": label}, "train.jsonl", i) for i, label in enumerate(labels, 1)]


def lines(clients: Clients) -> list[list[int]]:
    return [[row.line for row in rows] for rows in clients.values()]


def assert_whole(clients: Clients, rows: Sequence[Row]) -> None:
    """Every row once, each client's in the order of the file."""
    parts = lines(clients)
    assert sorted(itertools.chain(*parts)) == [row.line for row in rows]
    assert all(part == sorted(part) and part for part in parts)


@given(st.lists(st.sampled_from([*"abc", 1]), min_size=1, max_size=30))
def test_by_column(labels: list[Any]) -> None:
    rows = labelled(labels)
    clients = by_column(rows, "label")
    assert_whole(clients, rows)
    assert list(clients) == list(dict.fromkeys(str(label) for label in labels))
    assert all({str(row.fields["label"]) for row in held} == {name} for name, held in clients.items())


@given(st.integers(1, 60), st.data(), SEEDS)
def test_iid(count: int, data: st.DataObject, seed: int) -> None:
    rows = labelled("x" * count)
    clients = data.draw(st.integers(1, count))
    split = iid(rows, clients, Key.root(seed))
    assert_whole(split, rows)
    sizes = [len(held) for held in split.values()]
    assert len(sizes) == clients
    assert max(sizes) - min(sizes) <= 1
    assert split == iid(rows, clients, Key.root(seed))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=40, max_size=120), st.integers(1, 5), st.floats(0.1, 50), SEEDS)
def test_dirichlet(labels: list[int], clients: int, alpha: float, seed: int) -> None:
    rows = labelled(labels)
    split = dirichlet(rows, "label", clients, alpha, Key.root(seed), minimum=2)
    assert_whole(split, rows)
    assert len(split) == clients
    assert min(len(held) for held in split.values()) >= 2
    assert split == dirichlet(rows, "label", clients, alpha, Key.root(seed), minimum=2)


@pytest.mark.parametrize(
    "split",
    [
        lambda rows, key: lines(iid(rows, 4, key)),
        lambda rows, key: lines(dirichlet(rows, "task", 4, 0.5, key)),
        lambda rows, key: [row.line for row in holdout(rows, 0.3, key)[1]],
    ],
)
def test_another_key_is_another_split(split: Callable[[list[Row], Key], Any]) -> None:
    rows = tiny_rows(60)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    found = [split(rows, Key.root(seed)) for seed in range(8)]
    assert all(found[i] != found[j] for i in range(8) for j in range(i))
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_names_sort_as_their_numbers() -> None:
    names = list(iid(labelled("x" * 12), 11, Key.root(0)))
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("client-00", "client-10")


def test_alpha_is_skew() -> None:
    rows = labelled([i % 4 for i in range(2000)])

    def share(alpha: float) -> float:
        """How much of a client is its commonest label, on average; 0.25 is an even mix."""
        split = dirichlet(rows, "label", 10, alpha, Key.root(3))
        counts = [np.bincount([row.fields["label"] for row in held]) for held in split.values()]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert share(0.1) > 0.65
    assert 0.25 <= share(1000.0) < 0.3


def test_two_hundred_clients_of_at_least_ten() -> None:
    rows = labelled([i % 7 for i in range(14000)])
    split = dirichlet(rows, "label", 200, 0.5, Key.root(42), minimum=10)
    assert_whole(split, rows)
    assert min(len(held) for held in split.values()) >= 10


@given(st.integers(2, 50), st.floats(0, 1, exclude_max=True), SEEDS)
def test_holdout_by_fraction(count: int, share: float, seed: int) -> None:
    rows = labelled("x" * count)
    train, held = holdout(rows, share, Key.root(seed))
    assert_whole({"train": train} | ({"held": held} if held else {}), rows)
    assert abs(len(held) - share * count) <= 1
    assert (train, held) == holdout(rows, share, Key.root(seed))


def test_holdout_by_count_and_of_one_row() -> None:
    rows = labelled("x" * 10)
    assert [len(holdout(rows, count, Key.root(0))[1]) for count in (0, 1, 9)] == [0, 1, 9]
    assert [len(part) for part in holdout(rows[:1], 0.5, Key.root(0))] == [1, 0]
    assert len(holdout(rows, 0.01, Key.root(0))[1]) == 1


KEY = Key.root(0)
FIVE = labelled("aabbc")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by_column(FIVE, "site"), "train.jsonl:1: field 'site' is missing (present: label)"),
        (lambda: by_column(labelled(["a", " "]), "label"), "train.jsonl:2: field 'label' is empty"),
        (lambda: by_column(labelled(["a", None]), "label"), "train.jsonl:2: field 'label' is null"),
        (lambda: by_column([], "site"), "there are no rows"),
        (lambda: iid(FIVE, 6, KEY), "train.jsonl: 6 clients are more than the 5 rows"),
        (lambda: iid(FIVE, 0, KEY), "0 clients: at least one is needed"),
        (
            lambda: dirichlet(FIVE, "site", 2, 1.0, KEY),
            "train.jsonl:1: field 'site' is missing (present: label)",
        ),
        (lambda: dirichlet(FIVE, "label", 6, 1.0, KEY), "train.jsonl: 6 clients are more than the 5 rows"),
        (
            lambda: dirichlet(FIVE, "label", 2, 1.0, KEY, minimum=3),
            "train.jsonl: 2 clients of 3 rows are more than the 5 rows",
        ),
        (
            lambda: dirichlet(FIVE, "label", 2, 1.0, KEY, minimum=0),
            "minimum is 0; a client needs at least one row",
        ),
        (lambda: dirichlet(FIVE, "label", 2, 0.0, KEY), "alpha is 0.0; it must be a positive number"),
        (lambda: dirichlet(FIVE, "label", 2, math.nan, KEY), "alpha is nan; it must be a positive number"),
        (
            lambda: dirichlet(labelled("a" * 30), "label", 10, 0.01, KEY, minimum=3),
            "train.jsonl: no split of 30 rows over 10 clients by 'label' with alpha 0.01 gave every client 3 rows "
            "in 1000 tries; ask for fewer clients, a larger alpha or a smaller minimum",
        ),
        (lambda: holdout(FIVE, 5, KEY), "train.jsonl: holding out 5 of 5 rows leaves none to train on"),
        (lambda: holdout(FIVE, 1.0, KEY), "held out: 1.0 is neither a number of rows nor a fraction below 1"),
        (lambda: holdout(FIVE, -1, KEY), "held out: -1 is neither a number of rows nor a fraction below 1"),
        (lambda: holdout([], 0.5, KEY), "there are no rows"),
    ],
)
def test_complaints(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    assert str(caught.value) == message


@given(st.integers(1, 80), st.integers(1, 8), st.floats(1e-3, 1e3), st.integers(1, 3), SEEDS)
def test_by_size(count: int, clients: int, alpha: float, minimum: int, seed: int) -> None:
    rows = labelled(range(count))
    if clients * minimum > count:
        with pytest.raises(DataError, match="more than the"):
            by_size(rows, clients, alpha, Key.root(seed), minimum=minimum)
        return
    found = by_size(rows, clients, alpha, Key.root(seed), minimum=minimum)
    assert_whole(found, rows)
    assert len(found) == clients
    assert min(len(held) for held in found.values()) >= minimum
    assert found == by_size(rows, clients, alpha, Key.root(seed), minimum=minimum)


def test_sizes_are_more_alike_with_a_larger_alpha_and_rows_are_mixed() -> None:
    rows = labelled(range(1000))
    spread = []
    for alpha in (0.3, 3.0, 300.0):
        draws = [by_size(rows, 10, alpha, Key.root(seed)) for seed in range(20)]
        spread.append(np.mean([np.std([len(held) for held in found.values()]) for found in draws]))
    assert spread[0] > 2 * spread[1] > 4 * spread[2]
    means = [np.mean(part) for part in lines(by_size(rows, 4, 300.0, Key.root(0)))]
    assert max(means) - min(means) < 150  # contiguous parts would be 750 apart
    one = by_size(rows, 3, 1e-300, Key.root(0))
    assert sorted(len(held) for held in one.values()) == [1, 1, 998]
    with pytest.raises(DataError, match="alpha is 0; it must be a positive number"):
        by_size(rows, 3, 0, Key.root(0))


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40), st.integers(1, 7), SEEDS)
def test_by_task(labels: list[str], clients: int, seed: int) -> None:
    rows = labelled(labels)
    if clients > len(set(labels)):
        with pytest.raises(DataError, match=f"{clients} clients are more than the "):
            by_task(rows, "label", clients, Key.root(seed))
        return
    found = by_task(rows, "label", clients, Key.root(seed))
    assert_whole(found, rows)
    tasks = [{row.fields["label"] for row in held} for held in found.values()]
    assert sum(map(len, tasks)) == len(set(labels))  # none with two clients
    assert max(map(len, tasks)) - min(map(len, tasks)) <= 1
