"""FedPepTAO against its equations: scores, the ratio, what is shared, and control variates under AdamW."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net

from thinwire import wire
from thinwire.aggregate.server_step import Plain
from thinwire.core import StaleVersion
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedpeptao import CONTROL, HELD, OWN, FedPepTAO, Part, Ranked
from thinwire.methods.scaffold import Scaffold
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.views import Prompt
from thinwire.runtime.store import ClientMemories
from thinwire.train.objective import loss

LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 3, "batch_size": 4}
SGD: dict[str, Any] = {"lr": 0.3, "batch_size": 4, "clip": 0.0, "optimiser": "sgd", "weighting": "uniform"}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return deep_net(tmp_path_factory.mktemp("model"))


def deep_net(folder: Path, **fields: Any) -> Net:
    tiny_net(folder, num_hidden_layers=3)
    return Net.open(str(folder), view=Prompt(tokens=4, deep=True), remember=True, **fields)


def names(net: Net, layers: list[int]) -> set[str]:
    return {name for name in net.names if int(name.split(".")[-2]) in layers}


def test_with_all_layers_shared_and_nothing_added_it_is_fedavg(net: Net, tmp_path: Path) -> None:
    """One step of plain SGD from c = 0, and the mean as it is: the same bits. A second round's are others."""
    fields = {**SGD, "steps": 1}
    mine = Federation(FedPepTAO(**fields, share=1.0, server_step=Plain()), net, tmp_path / "a", rounds=2)
    theirs = Federation(FedAvg(**fields), net, tmp_path / "b", rounds=2)
    for equal in (True, False):
        mine.step()
        theirs.step()
        same = [torch.equal(mine.state.weights[name], tensor) for name, tensor in theirs.state.weights.items()]
        assert all(same) == equal


def test_with_sgd_and_all_layers_it_is_scaffold_for_less(net: Net, tmp_path: Path) -> None:
    """Three rounds of everybody; up travel the weights alone."""
    fields = {**SGD, "steps": 3, "warmup": 1}
    mine = Federation(FedPepTAO(**fields, share=1.0, server_step=Plain()), net, tmp_path / "a", rounds=3).run()
    theirs = Federation(Scaffold(**fields), net, tmp_path / "b", rounds=3).run()
    for name, tensor in theirs.state.weights.items():
        torch.testing.assert_close(mine.state.weights[name], tensor, rtol=0, atol=1e-5)
        torch.testing.assert_close(mine.state.controls[name], theirs.state.controls[name], rtol=0, atol=1e-4)
        assert theirs.state.controls[name].abs().max() > 2e-3
    ups = [run.history[-1].visits[0].bytes_up for run in (mine, theirs)]
    assert ups[0] < 0.6 * ups[1]


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_step_is_adamws_and_the_control_variate(warmup: int, net: Net, tmp_path: Path) -> None:
    """A second visit, step by step in torch's own AdamW, and what c_i and c become."""
    method = FedPepTAO(**LOCAL, clip=0.0, warmup=warmup, share=0.7, server_step=Plain())
    federation = Federation(method, net, tmp_path, rounds=2).run(1)
    server, client = federation.server(2, (0, 1, 2)), federation.client(1, 2)
    down = method.broadcast(federation.state, server, 1, HELD)
    assert set(down.weights) == names(net, down.layers) != set(net.names)
    before = {name: tensor.clone() for name, tensor in client.memory.items()}
    up = wire.decode(Ranked, wire.encode(method.client_update(down, client)))

    weights = {
        n: (down.weights[n] if n in down.weights else before[OWN + n]).clone().requires_grad_() for n in net.names
    }
    optimiser = torch.optim.AdamW(weights.values(), lr=method.lr, weight_decay=0.0)
    rows, total = client.data.batches(client.key.fold("batches"), 4), 0.0
    for step in range(3):
        rate = method.lr * min(1.0, (step + 1) / (warmup + 1))
        total += rate
        for name, parameter in net.parameters():
            with torch.no_grad():
                parameter.copy_(weights[name])
            parameter.grad = None
        loss(net.model, next(rows)).backward()
        for name, parameter in net.parameters():
            weights[name].grad = parameter.grad
            parameter.grad = None
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        with torch.no_grad():
            for name in down.weights:
                weights[name] -= rate * (down.controls[name] - before[CONTROL + name])
    for name in net.names:
        found = up.weights[name] if name in up.weights else client.memory[OWN + name]
        torch.testing.assert_close(found, weights[name].detach(), rtol=0, atol=2e-6)
    for name, start in down.weights.items():
        moved = before[CONTROL + name] - down.controls[name] + (start - weights[name].detach()) / total
        torch.testing.assert_close(client.memory[CONTROL + name], moved, rtol=0, atol=1e-3)
        assert (down.controls[name] - before[CONTROL + name]).abs().max() > 1e-2


def test_c_is_the_mean_of_what_the_clients_keep(net: Net, tmp_path: Path) -> None:
    """With everybody there and equal weights; with one of three it has moved by a third."""
    method = FedPepTAO(**LOCAL, weighting="uniform", share=0.7)
    federation = Federation(method, net, tmp_path / "all", rounds=3).run()
    kept = [federation.memories.of(id, 4) for id in range(3)]
    for name in names(net, federation.state.layers):
        mean = torch.stack([memory[CONTROL + name] for memory in kept]).mean(0)
        torch.testing.assert_close(federation.state.controls[name], mean, rtol=0, atol=1e-4)
    alone = Federation(method, net, tmp_path / "one", rounds=1)
    alone.step(cohort=(1,))
    own = alone.memories.of(1, 2)
    for name, control in alone.state.controls.items():
        torch.testing.assert_close(control, own[CONTROL + name] / 3, rtol=1e-5, atol=1e-7)


def test_layers_that_are_not_shared_stay_at_their_clients(net: Net, tmp_path: Path) -> None:
    """After the first round they are in no frame but a newcomer's first, and each client's are its own."""
    seen: list[tuple[int, Any]] = []

    def watch(frame: wire.Frame) -> None:
        header = frame.header()
        seen.append((header.round, wire.decode({"Part": Part, "Ranked": Ranked}[header.kind], frame)))

    method = FedPepTAO(**LOCAL, share=0.4)
    federation = Federation(method, net, tmp_path, rounds=4, watch=watch)
    federation.step(cohort=(0, 1))
    layers = federation.state.layers
    assert len(layers) == 1
    frozen = {n: t for n, t in federation.state.weights.items() if n not in names(net, layers)}
    federation.step(cohort=(0, 1, 2))
    federation.step()
    new = [payload for round, payload in seen if round == 2 and isinstance(payload, Part)]
    assert sorted(len(down.weights) for down in new) == [1, 1, 3]
    assert all(
        set(p.weights) == names(net, layers)
        for round, p in seen
        if round == 3 or (isinstance(p, Ranked) and round == 2)
    )
    own = [federation.memories.of(id, 4) for id in range(3)]
    for name, tensor in frozen.items():
        assert torch.equal(federation.state.weights[name], tensor)
        assert all(not torch.equal(own[a][OWN + name], own[b][OWN + name]) for a, b in ((0, 1), (1, 2)))
    down = method.broadcast(federation.state, federation.server(4, (2,)), 2, HELD)
    client = federation.client(2, 4)
    method.receive(down, client)
    assert all(torch.equal(net.parameter(name), own[2][OWN + name]) for name in frozen)
    client.memory.clear()
    with pytest.raises(StaleVersion):
        method.receive(down, client)


def test_a_client_that_lost_its_own_is_sent_all_again(net: Net, tmp_path: Path) -> None:
    federation = Federation(FedPepTAO(**LOCAL, share=0.4), net, tmp_path, rounds=3).run(2)
    before = federation.history[-1].visits[1].bytes_down
    shutil.rmtree(tmp_path / "clients")
    federation.memories = ClientMemories(tmp_path / "clients")
    visit = federation.step().visits[1]
    assert visit.error is None
    assert visit.bytes_down > 2 * before  # what it could not use, and then everything


def test_the_layers_of_the_highest_mean_scores_are_shared(net: Net, tmp_path: Path) -> None:
    scores = {0: [1.0, 5.0, 3.0], 1: [2.0, 5.0, 3.0], 2: [9.0, 5.0, 3.0]}
    ratios = {0: 0.2, 1: 0.2, 2: 0.9}

    def tamper(client: int, frame: wire.Frame) -> wire.Frame:
        header, up = frame.header(), wire.decode(Ranked, frame)
        up = dataclasses.replace(up, scores=scores[client], ratio=ratios[client])
        return wire.encode(up, run=header.run, round=header.round, client=client)

    method = FedPepTAO(**LOCAL, lanczos=1)
    federation = Federation(method, net, tmp_path, rounds=1, sizes=(8, 8, 16), tamper=tamper)
    federation.step()
    # 8, 8, 16 rows: scores 5.25, 5, 3; ratio 0.55 of three layers
    assert federation.state.layers == [0, 1]
    assert federation.metrics["layers_shared"] == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": [1.0, 2.0]}, "2 scores of layers"),
        ({"scores": [1.0, 2.0, math.inf]}, "a score that is not finite"),
        ({"ratio": 1.5}, "a ratio of 1.5"),
        ({"ratio": math.nan}, "a ratio of nan"),
    ],
)
def test_what_a_client_may_not_answer(change: Any, reason: str, net: Net, tmp_path: Path) -> None:
    federation = Federation(FedPepTAO(), net, tmp_path)
    good = Ranked(dict(federation.state.weights), [1.0, 2.0, 3.0], 0.5, 8, 0.5, 0)
    federation.method.check(federation.state, 0, good)
    with pytest.raises(wire.Illegal, match=reason):
        federation.method.check(federation.state, 0, dataclasses.replace(good, **change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: {"layers": [7]}, "layers that are shared"),
        (lambda p: {"controls": {}}, "layers that are shared"),
        (lambda p: {"controls": {n: c * math.nan for n, c in p.controls.items()}}, "control variate of"),
        (lambda p: {"weights": dict(list(p.weights.items())[1:])}, "names of the weights"),
    ],
)
def test_what_a_server_may_not_send(change: Any, reason: str, net: Net, tmp_path: Path) -> None:
    federation = Federation(FedPepTAO(), net, tmp_path)
    down = federation.method.broadcast(federation.state, federation.server(1, (0,)), 0, None)
    client = federation.client(0, 1)
    federation.method.receive(down, client)
    with pytest.raises(wire.Illegal, match=reason):
        federation.method.receive(dataclasses.replace(down, **change(down)), client)


def test_a_view_of_one_layer_is_refused(tmp_path: Path) -> None:
    tiny_net(tmp_path)
    with pytest.raises(ModelError, match=r"shares the parameters of some layers, and this view trains those of 1: "):
        FedPepTAO().fits(Net.open(str(tmp_path), view=Prompt(tokens=2)))


def test_each_client_ranks_on_rows_of_its_own(net: Net, tmp_path: Path) -> None:
    federation = Federation(FedPepTAO(**LOCAL, lanczos=3), net, tmp_path)
    down = federation.method.broadcast(federation.state, federation.server(1, (0, 1)), 0, None)
    one, two = (federation.method.client_update(down, federation.client(id, 1)) for id in (0, 1))
    assert len(one.scores) == len(two.scores) == 3
    assert one.scores != two.scores
    assert 0 <= one.ratio <= 1
