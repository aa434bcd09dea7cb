"""The bound of an audit in one run: against the formula written out, and against what is truly so private."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from thinwire.leaks.bound import bound, p_value


def plainly(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The formula, over all outcomes one by one."""
    q = math.exp(epsilon) / (math.exp(epsilon) + 1)
    chance = dict.fromkeys(range(-guesses, guesses + 1), 0.0)
    for outcome in itertools.product((0, 1), repeat=guesses):
        chance[sum(outcome)] += math.prod(q if one else 1 - q for one in outcome)
    beta = sum(chance[k] for k in range(right, guesses + 1))
    alphas = [sum(chance[right - j] for j in range(1, i + 1)) / i for i in range(1, guesses + 1)]
    return min(1.0, beta + 2 * canaries * delta * max(alphas))


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_p_value_is_the_papers(epsilon: float, delta: float) -> None:
    for guesses in (1, 5, 8):
        for right in range(guesses + 1):
            found = p_value(right, guesses, 2 * guesses, epsilon, delta)
            assert found == pytest.approx(plainly(right, guesses, 2 * guesses, epsilon, delta), rel=1e-9)


@pytest.mark.parametrize(("right", "guesses"), [(8, 8), (32, 32), (100, 100)])
def test_with_all_guesses_right_the_bound_is_a_root(right: int, guesses: int) -> None:
    q = 0.05 ** (1 / guesses)  # P[Bin(r, q) = r] = 5 %
    assert bound(right, guesses, guesses, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-9)


def test_the_bound_is_where_the_p_value_crosses() -> None:
    found = bound(80, 100, 200, 1e-5)
    assert found > 0.5
    assert p_value(80, 100, 200, found - 1e-6, 1e-5) < 0.05 < p_value(80, 100, 200, found + 1e-6, 1e-5)
    assert bound(80, 100, 200, 1e-5) < bound(80, 100, 200, 0.0)  # delta is paid for
    assert bound(80, 100, 200, 1e-5, level=0.01) < found
    assert bound(50, 100, 200, 1e-5) == bound(3, 4, 8, 0.0) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 4.0])
def test_of_randomised_response_the_bound_is_above_the_truth_in_five_runs_of_a_hundred_at_most(epsilon: float) -> None:
    count, q = 100, math.exp(epsilon) / (math.exp(epsilon) + 1)
    bounds = np.array([bound(right, count, count, 0.0) for right in range(count + 1)])
    chance = [math.comb(count, k) * q**k * (1 - q) ** (count - k) for k in range(count + 1)]
    assert sum(p for p, found in zip(chance, bounds, strict=True) if found > epsilon) <= 0.05
    draw = np.random.default_rng(0)  # and drawn: a coin a canary, reported as it is with probability q
    found = bounds[(draw.random((4000, count)) < q).sum(1)]
    assert (found > epsilon).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)
    assert np.median(found) > 0.2 * epsilon  # it is no bound that never says anything


def test_counts_that_cannot_be_are_refused() -> None:
    for right, guesses, canaries in ((3, 2, 4), (2, 5, 4), (-1, 2, 4)):
        with pytest.raises(ValueError, match="guesses are right about"):
            p_value(right, guesses, canaries, 1.0, 0.0)
