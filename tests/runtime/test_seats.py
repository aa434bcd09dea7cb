"""The tree of keys: what each seat's key is, and that all who draw a cohort draw the run's."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import Federation, tiny_net

from thinwire.keys import Key
from thinwire.methods.fedavg import FedAvg
from thinwire.runtime.cohort import All, Uniform
from thinwire.runtime.seats import Seats


def test_every_seat_has_its_key(tmp_path: Path) -> None:
    seats = Federation(FedAvg(), tiny_net(tmp_path / "model"), tmp_path, seed=5).seats
    root = Key.root(5)
    assert seats.server(0).key == root.fold("server", 0)
    assert seats.server(3, [2, 0]).key == root.fold("server", 3)
    assert seats.client(1, 3).key == root.fold("client", 1, "round", 3)
    assert (seats.server(3, [2, 0]).cohort, seats.server(3).round, seats.server(3).rounds) == ((2, 0), 3, 4)
    assert (seats.client(1, 3).id, seats.client(1, 3).held) == (1, None)
    assert seats.client(1, 3).data is seats.data[1]


@pytest.mark.parametrize("round", [1, 2, 7])
def test_a_cohort_is_drawn_with_the_rounds_key(round: int) -> None:
    segments, key = [Uniform(n=2, rounds=3), All()], Key.root(0)
    drawn = Seats(key, 9).cohort(segments, 6, round)
    assert drawn == (
        tuple(sorted(key.fold("cohort", round).permutation(6)[:2].tolist())) if round < 4 else (0, 1, 2, 3, 4, 5)
    )
