"""Who holds which rows: pure functions from rows to clients, drawn from a key alone.

Each returns client name -> rows; every row stands with one client, in the order of the file, and no client is
empty. Equal rows count as different rows: drop duplicates first where a held-out split must not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.keys import Key

TRIES = 1000

Clients = dict[str, list[Row]]


def by_column(rows: Sequence[Row], column: str) -> Clients:
    """One client for each value of `column`, named by it, in the order in which the values first appear.

    DataError for a row whose value is missing, blank or no text.
    """
    _need(rows)
    return {value: [rows[i] for i in indices] for value, indices in _groups(rows, column).items()}


def iid(rows: Sequence[Row], clients: int, key: Key) -> Clients:
    """The rows dealt at random to `clients` clients whose sizes differ by at most one."""
    _need(rows, clients)
    order = key.permutation(len(rows))
    return _named(rows, [order[i::clients] for i in range(clients)])


def dirichlet(rows: Sequence[Row], column: str, clients: int, alpha: float, key: Key, *, minimum: int = 1) -> Clients:
    """Skewed clients: for each value of `column`, what each client gets of it follows Dirichlet(alpha).

    The smaller alpha, the more a client holds of few values. As is usual, a client that already holds its
    even share of all rows gets nothing more, value after value, and the whole is drawn again until every
    client has `minimum` rows. The draws are numpy's: they repeat with one version of it. DataError, after
    TRIES draws, names what to change.
    """
    _need(rows, clients, minimum)
    _check_alpha(alpha)
    groups = list(_groups(rows, column).values())
    sizes = np.array([len(group) for group in groups])
    for attempt in range(TRIES):
        cuts = _draw(sizes, clients, alpha, key.fold("draw", attempt).numpy())
        if cuts is None or np.diff(cuts, axis=1).sum(axis=0).min() < minimum:
            continue
        held: list[list[int]] = [[] for _ in range(clients)]
        for g, group in enumerate(groups):
            order = np.array(group)[key.fold("order", g).permutation(len(group))]
            for client in range(clients):
                held[client].extend(order[cuts[g, client] : cuts[g, client + 1]].tolist())
        return _named(rows, held)
    raise DataError(
        f"{rows[0].source}: no split of {len(rows)} rows over {clients} clients by '{column}' with alpha {alpha} "
        f"gave every client {minimum} rows in {TRIES} tries; "
        "ask for fewer clients, a larger alpha or a smaller minimum"
    )


def by_size(rows: Sequence[Row], clients: int, alpha: float, key: Key, *, minimum: int = 1) -> Clients:
    """The rows dealt at random to clients whose shares of them follow Dirichlet(alpha): small alpha, unlike sizes.

    Each client gets `minimum` rows, and its share of what is left. The draw is numpy's: it repeats with one version.
    """
    _need(rows, clients, minimum)
    _check_alpha(alpha)
    weights = key.fold("draw").numpy().dirichlet(np.full(clients, alpha))
    if not weights.sum() > 0:  # a tiny alpha underflows: one client has it all
        weights = np.eye(clients)[0]
    rest = len(rows) - clients * minimum
    cuts = np.rint(np.cumsum(weights) / weights.sum() * rest).astype(np.int64)
    cuts[-1] = rest
    cuts = np.concatenate([[0], cuts]) + minimum * np.arange(clients + 1)
    order = key.fold("order").permutation(len(rows))
    return _named(rows, [order[cuts[i] : cuts[i + 1]] for i in range(clients)])


def by_task(rows: Sequence[Row], column: str, clients: int, key: Key) -> Clients:
    """Each value of `column` with one client, whole; the values dealt at random, to each as many, give or take one.

    DataError for a row whose value is missing, blank or no text, and for fewer values than clients.
    """
    _need(rows, clients)
    groups = list(_groups(rows, column).values())
    if clients > len(groups):
        raise DataError(f"{rows[0].source}: {clients} clients are more than the {len(groups)} values of '{column}'")
    order = key.permutation(len(groups))
    return _named(rows, [[i for g in order[client::clients] for i in groups[g]] for client in range(clients)])


def holdout(rows: Sequence[Row], share: float, key: Key) -> tuple[list[Row], list[Row]]:
    """The rows to train on and the rows held out, each in the order of the file.

    `share` is a whole number of rows (int) or a fraction below 1 (float). A fraction above 0 holds out at
    least one row and always leaves one, so a client of a single row keeps it. DataError where a count leaves
    nothing to train on.
    """
    _need(rows)
    if isinstance(share, bool) or share < 0 or (isinstance(share, float) and not share < 1):
        raise DataError(f"held out: {share} is neither a number of rows nor a fraction below 1")
    if isinstance(share, int):
        if share >= len(rows):
            raise DataError(f"{rows[0].source}: holding out {share} of {len(rows)} rows leaves none to train on")
        count = share
    else:
        count = min(max(1, round(share * len(rows))), len(rows) - 1) if share > 0 else 0
    held = set(key.permutation(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _draw(
    sizes: NDArray[np.int64], clients: int, alpha: float, generator: np.random.Generator
) -> NDArray[np.int64] | None:
    """Where each value's rows are cut, [values, clients + 1], from 0 to their number; None for a failed draw."""
    cuts = np.zeros((len(sizes), clients + 1), dtype=np.int64)
    held = np.zeros(clients, dtype=np.int64)
    for g, size in enumerate(sizes):
        weights = np.where(held < sizes.sum() / clients, generator.dirichlet(np.full(clients, alpha)), 0.0)
        # With a tiny alpha all the weight can lie on clients that are full, or underflow.
        if not weights.sum() > 0:
            return None
        cuts[g, 1:] = np.cumsum(weights) / weights.sum() * size
        cuts[g, -1] = size  # a sum that rounds below 1 must not lose a row
        held += np.diff(cuts[g])
    return cuts


def _groups(rows: Sequence[Row], column: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        value = row.text(column)
        if not value.strip():
            raise row.error(f"field '{column}' is empty")
        groups.setdefault(value, []).append(i)
    return groups


def _named(rows: Sequence[Row], parts: Sequence[Iterable[int]]) -> Clients:
    """Clients numbered with leading zeros, so that the order of the names is that of the numbers."""
    width = len(str(len(parts) - 1))
    return {f"client-{n:0{width}d}": [rows[i] for i in sorted(part)] for n, part in enumerate(parts)}


def _check_alpha(alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise DataError(f"alpha is {alpha}; it must be a positive number")


def _need(rows: Sequence[Row], clients: int = 1, minimum: int = 1) -> None:
    if not rows:
        raise DataError("there are no rows")
    if clients < 1:
        raise DataError(f"{clients} clients: at least one is needed")
    if minimum < 1:
        raise DataError(f"minimum is {minimum}; a client needs at least one row")
    if clients > len(rows):
        raise DataError(f"{rows[0].source}: {clients} clients are more than the {len(rows)} rows")
    if clients * minimum > len(rows):
        raise DataError(f"{rows[0].source}: {clients} clients of {minimum} rows are more than the {len(rows)} rows")
