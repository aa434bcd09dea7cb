"""What replies were worth, against the definition over all orders."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from thinwire.evaluate.contributions import exact, leave_one_out, most, shapley
from thinwire.keys import Key

CLIENTS = (0, 2, 3, 7)


def game(seed: int = 0) -> tuple[dict[frozenset[int], float], list[frozenset[int]]]:
    """A value of every set of four clients, none like another; and a list of those that were asked for."""
    rng = np.random.default_rng(seed)
    sets = [frozenset(some) for size in range(5) for some in itertools.combinations(CLIENTS, size)]
    return {some: float(rng.normal()) for some in sets}, []


def all_orders(values: dict[frozenset[int], float]) -> dict[int, float]:
    """The definition: the mean over all 24 orders of what each adds to those before it."""
    found = dict.fromkeys(CLIENTS, 0.0)
    for order in itertools.permutations(CLIENTS):
        for i, client in enumerate(order):
            found[client] += (values[frozenset(order[: i + 1])] - values[frozenset(order[:i])]) / math.factorial(4)
    return found


def test_exact_values_are_the_means_over_all_orders() -> None:
    values, asked = game()

    def value(some: frozenset[int]) -> float:
        asked.append(some)
        return values[some]

    found = shapley(value, CLIENTS, 50, Key.root(1))
    assert {client: worth.value for client, worth in found.items()} == pytest.approx(all_orders(values))
    assert all(worth.error == 0 for worth in found.values())
    assert len(asked) == len(set(asked)) == most(4, 50) == 16  # no set is asked for twice


@pytest.mark.parametrize("seed", range(4))
def test_estimates_are_within_their_stated_error(seed: int) -> None:
    """Of ten clients that are worth more together than alone: some more than others, some nothing."""
    clients, rng = tuple(range(10)), np.random.default_rng(seed)
    worth, pairs = rng.uniform(0, 1, 10), rng.normal(0, 0.3, (10, 10))

    def value(some: frozenset[int]) -> float:
        members = sorted(some)
        return float(worth[members].sum() + pairs[np.ix_(members, members)].sum())

    assert exact(10, 200)
    assert not exact(10, 60)
    want = shapley(value, clients, 200, Key.root(seed))
    # of a sum over pairs the definition comes to half of each pair for either client
    plain = {i: worth[i] + pairs[i, i] + sum(pairs[i, j] + pairs[j, i] for j in clients if j != i) / 2 for i in clients}
    assert {client: each.value for client, each in want.items()} == pytest.approx(plain)
    found = shapley(value, clients, 60, Key.root(seed))
    assert sum(each.value for each in found.values()) == pytest.approx(value(frozenset(clients)))
    for client in clients:
        assert abs(found[client].value - plain[client]) <= 4 * found[client].error, client
        assert 0 < found[client].error < 0.3


def test_leave_one_out() -> None:
    values, _ = game()
    whole = values[frozenset(CLIENTS)]
    want = {client: whole - values[frozenset(CLIENTS) - {client}] for client in CLIENTS}
    assert leave_one_out(values.__getitem__, CLIENTS) == want


def test_the_cost_is_what_is_asked_for_at_most() -> None:
    for clients, orders in ((1, 2), (2, 2), (4, 4), (7, 3), (12, 5), (40, 50)):
        asked: set[frozenset[int]] = set()

        def value(some: frozenset[int], asked: set[frozenset[int]] = asked) -> float:
            asked.add(some)
            return float(len(some))

        names = tuple(range(clients))
        leave_one_out(value, names)
        found = shapley(value, names, orders, Key.root(0))
        assert len(asked) <= most(clients, orders), (clients, orders)
        assert all(worth.value == pytest.approx(1) for worth in found.values())
