"""What no method takes from a client or a hub: lies that are legal in shape, numbers beyond their range."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from one_of_ten import ATTACKS, METHODS, ONE, begun, nets

from thinwire import wire
from thinwire.model.net import Net
from thinwire.runtime.endpoint import serve
from thinwire.wire import WireError

Nets = Callable[[str], Net]
LIES: dict[str, dict[str, Any]] = {
    "examples beyond its rows": {"examples": 10**6},
    "examples of 64 bits": {"examples": 2**64 - 1},
    "no examples": {"examples": 0},
    "a loss that overflows": {"loss": 1e308},
    "a loss that overflows downwards": {"loss": -1e308},
    "steps skipped below none": {"skipped": -(2**63)},
    "a key below none": {"key": -1},
}
ORDERS: dict[str, dict[str, Any]] = {
    "a rate below none": {"lr": -1e-3},
    "a rate beyond all": {"lr": 1e300},
    "a rate that is no number": {"lr": math.nan},
    "a key below none": {"key": -1},
    "directions below none": {"pool": -1},
    "draws below none": {"draws": -1},
    "a shrink that overflows": {"shrink": 1e308},
    "a block that is not there": {"block": -1},
    "votes below none": {"count": -1},
    "more votes than a run has": {"count": 1 << 40},
}
TABLES = ("weights", "changes", "codec", "cut", "factors", "values", "controls")


@pytest.fixture(scope="module")
def net_of(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    return nets(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", list(METHODS))
def test_a_lie_costs_its_client_the_round_and_nobody_else(name: str, net_of: Nets, tmp_path: Path) -> None:
    method, tried = METHODS[name], 0
    forged: list[Any] = []
    federation = begun(method, net_of(name), tmp_path, 99, lambda at, up: forged[0](at, up), (8, 6, 7, 9))
    fields = {field.name for field in dataclasses.fields(method.Up)}
    lies = {title: lie for title, lie in LIES.items() if set(lie) <= fields}
    attacks: dict[str, Callable[[Any, Any], Any]] = {
        title: lambda at, up, lie=lie: dataclasses.replace(up, **lie) for title, lie in lies.items()
    }
    attacks["changes beyond all"] = ATTACKS["weights 3e38"]
    for title, attack in attacks.items():
        forged[:] = [attack]
        with contextlib.suppress(ValueError):  # what the codec has no word for cannot be sent either
            federation.step()
            tried += 1
        at = federation.history[-1]
        assert at.visits[ONE].error is not None, title
        assert at.visits[ONE].error.startswith("Illegal: "), title
        assert all(at.visits[other].error is None for other in (0, 1, 2)), title
    assert tried >= 3
    federation.method.materialise(federation.state, federation.net)
    assert all(torch.isfinite(p).all() for p in federation.net.model.parameters())


@pytest.mark.parametrize("name", list(METHODS))
def test_a_broadcast_that_no_server_sends_is_a_wire_error(name: str, net_of: Nets, tmp_path: Path) -> None:
    method = METHODS[name]
    federation = begun(method, net_of(name), tmp_path, 9)
    down = method.broadcast(federation.state, federation.server(1, (0,)), 0, None)
    fields = {field.name for field in dataclasses.fields(method.Down)}
    orders = {title: order for title, order in ORDERS.items() if set(order) <= fields}
    for field in TABLES:
        table = getattr(down, field, None)
        if isinstance(table, Mapping) and table:
            first = next(iter(table))
            orders[f"{field} of other names"] = {field: {"x": torch.zeros(2)}}
            orders[f"{field} without one"] = {field: {n: t for n, t in table.items() if n != first}}
            orders[f"{field} of another shape"] = {field: {**table, first: torch.zeros(3, dtype=table[first].dtype)}}
    assert len(orders) >= 3
    for title, order in orders.items():
        frame = wire.encode(dataclasses.replace(down, **order), run=1, round=1, client=0)
        with pytest.raises(WireError):
            print(title, serve(method, frame, federation.client(0, 1)))  # noqa: T201 - which one, where it passes
