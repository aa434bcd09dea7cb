"""A test's row of the matrix: its name, its method and the net that it runs on."""

from __future__ import annotations

import pytest
from rows import ROWS, Nets, net_for, opened

from thinwire.core import Method
from thinwire.model.net import Net


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    return opened(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=list(ROWS))
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def net(row: str, nets: Nets) -> Net:
    return net_for(row, nets)


@pytest.fixture
def method(row: str) -> Method:
    return ROWS[row].method
