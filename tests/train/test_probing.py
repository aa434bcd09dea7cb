"""Clients that probe: they keep no activations, count by the cosine of their estimates, and learn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net

from thinwire.errors import ConfigError
from thinwire.evaluate.loss import mean_loss
from thinwire.methods.onebit import NUMBERS, OneBit
from thinwire.model.net import Net
from thinwire.model.views import Tied
from thinwire.train.differences import cosine
from thinwire.wire import Illegal

SETTINGS: dict[str, Any] = {"lr": 1e-2, "steps": 3, "batch_size": 4, "schedule": "constant", "probes": 4}
METHOD = OneBit(**SETTINGS, gradient={1: "probe"})


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    folder = tmp_path_factory.mktemp("model")
    tiny_net(folder)
    return Net.open(str(folder), remember=True, view=Tied(numbers=64, targets=("q_proj", "v_proj")))


def test_a_probing_client_makes_passes_without_a_way_back(net: Net, tmp_path: Path) -> None:
    federation, modes = Federation(METHOD, net, tmp_path), list[bool]()
    handle = net.model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    down = METHOD.broadcast(federation.state, federation.server(1, (0, 1)), 0, None)
    ups = [METHOD.client_update(down, federation.client(id, 1)) for id in (0, 1)]
    handle.remove()
    assert modes == 3 * [True] + 3 * 4 * 2 * [False]
    assert [up.probes for up in ups] == [None, 12]
    assert all(math.isfinite(up.loss) for up in ups)


def test_it_counts_by_the_cosine_that_its_estimate_is_expected_to_have(net: Net, tmp_path: Path) -> None:
    federation = Federation(METHOD, net, tmp_path)
    server = federation.server(1, (0, 1))
    down = METHOD.broadcast(federation.state, server, 0, None)
    ups = [METHOD.client_update(down, federation.client(id, 1)) for id in (0, 1)]
    updates = [METHOD.update(federation.state, server, up) for up in ups]
    assert [update.weight for update in updates] == [12, 8 * cosine(12, 64)]
    mean = METHOD.aggregation(enumerate(updates))[0][NUMBERS]
    wanted = (12 * updates[0].tensors[NUMBERS] + updates[1].weight * updates[1].tensors[NUMBERS]) / (
        12 + updates[1].weight
    )
    assert torch.allclose(mean, wanted, atol=1e-7)


def test_where_all_probe_they_count_by_their_examples_and_learn(net: Net, tmp_path: Path) -> None:
    method = OneBit(**SETTINGS | {"probes": 16}, gradient="probe")
    federation = Federation(method, net, tmp_path, rounds=8)

    def measured() -> float:
        method.materialise(federation.state, net)
        return mean_loss(net.model, federation.data[0], 12)[0]

    before = measured()
    federation.run()
    assert measured() < before - 0.1


def test_a_step_whose_loss_is_none_is_skipped(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.train import local

    monkeypatch.setattr(local, "batch_loss", lambda *_: torch.tensor(math.nan))
    federation = Federation(METHOD, net, tmp_path)
    down = METHOD.broadcast(federation.state, federation.server(1, (1,)), 1, None)
    up = METHOD.client_update(down, federation.client(1, 1))
    assert (up.skipped, up.probes) == (3, 1)
    assert METHOD.update(federation.state, federation.server(1, (1,)), up).weight > 0


def test_what_is_wrong_is_refused_in_a_line(net: Net, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.gradient: no client 7: there are 2 clients, 0 to 1"):
        OneBit(gradient={7: "probe", 1: "probe"}).check_clients(2)
    METHOD.check_clients(2)
    for wrong in ({"gradient": "forward"}, {"probes": 0}, {"eps": 0.0}, {"gradient": {-1: "probe"}}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OneBit.model_validate(wrong)
    federation = Federation(METHOD, net, tmp_path)
    down = METHOD.broadcast(federation.state, federation.server(1, (1,)), 1, None)
    up = METHOD.client_update(down, federation.client(1, 1))
    with pytest.raises(Illegal, match="0 probes"):
        METHOD.check(federation.state, 1, replace(up, probes=0))
