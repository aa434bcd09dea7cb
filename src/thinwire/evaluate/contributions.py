"""What each client's reply was worth in a round, by a value v of any set S of them.

    leave one out     v(N) - v(N without k)
    Shapley           phi_k = sum over S without k of |S|! (n - |S| - 1)! / n! (v(S with k) - v(S))
                            = the mean over all orders of v(those before k, and k) - v(those before k)

The second form is estimated from some orders, drawn at random (Castro et al., 2009), where all sets are too many: the
standard error of each mean is found with it. In either form the phi sum to v(N) - v(none).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

from thinwire.keys import Key

Set = frozenset[int]
Value = Callable[[Set], float]


class Worth(NamedTuple):
    """A client's Shapley value, and its standard error: 0 where it is exact."""

    value: float
    error: float


def exact(clients: int, orders: int) -> bool:
    """Whether all sets of so many clients are no more than so many orders would ask for."""
    return clients <= 20 and 2**clients <= 2 + orders * max(clients - 1, 0)


def most(clients: int, orders: int) -> int:
    """How many sets are asked for at most, leave-one-out among them."""
    if exact(clients, orders):
        return int(2**clients)
    return min(2 + orders * (clients - 1) + clients, int(2 ** min(clients, 62)))


def leave_one_out(value: Value, clients: Sequence[int]) -> dict[int, float]:
    """Client -> what is lost without it."""
    whole = frozenset(clients)
    return {client: value(whole) - value(whole - {client}) for client in clients}


def shapley(value: Value, clients: Sequence[int], orders: int, key: Key) -> dict[int, Worth]:
    """Client -> its Shapley value: exact where that costs no more than so many orders, else their mean. orders: > 1."""
    value, n = cache(value), len(clients)
    if exact(n, orders):
        found = dict.fromkeys(clients, 0.0)
        for client in clients:
            others = [other for other in clients if other != client]
            for size in range(n):
                share = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                for some in map(frozenset, combinations(others, size)):
                    found[client] += share * (value(some | {client}) - value(some))
        return {client: Worth(total, 0.0) for client, total in found.items()}
    gains = np.zeros((orders, n))
    for row in range(orders):
        before, last = frozenset[int](), value(frozenset())
        for i in key.fold("order", row).permutation(n):
            before |= {clients[i]}
            gains[row, i], last = value(before) - last, value(before)
    errors = gains.std(0, ddof=1) / math.sqrt(orders)
    return {client: Worth(float(gains[:, i].mean()), float(errors[i])) for i, client in enumerate(clients)}
