"""A method reports its own costs: a toy by hooks of its own, a subclass by those that it inherits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_folder

from thinwire import config, wire
from thinwire.config import Run
from thinwire.core import Method
from thinwire.costs.frames import Expected, Frames, fixed
from thinwire.costs.memory import CODECS, IMAGE, Memory, Side, holding, training
from thinwire.costs.sketch import Pass, Sketch, Work
from thinwire.estimate.costs import estimate
from thinwire.estimate.sketch import one_pass, sketch
from thinwire.methods.cgfed import CGFed
from thinwire.methods.fedavg import FedAvg, Weights


class Rows(Method):
    """A toy: the first row of each tensor travels, and each round makes a step more than the one before."""

    Down = Up = State = Weights

    def work(self, round: int) -> Work:
        return Work(steps=round, rows=3 * 2 * round, batch=2)

    def frames(self, at: Expected) -> Frames | None:
        rows = Weights({name: tensor[:1] for name, tensor in at.trained.items()})
        return fixed(at, rows, lambda examples: rows)

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        return training(at, forward, "sgd") if side == "client" else holding(at, copies=1000)


class Mine(FedAvg):
    """A sibling that changes nothing of what it costs."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "model")


def run_of(place: Path, method: Method, **model: Any) -> Run:
    data = {"path": "absent.jsonl", "clients": 2, "max_length": 32}
    tree = {"model": {"path": str(place), **model}, "data": data, "method": {"name": "fedavg"}, "rounds": 3}
    return config.parse(tree).model_copy(update={"method": method})


def test_a_toy_is_estimated_by_its_own_hooks(place: Path) -> None:
    run = run_of(place, Rows())
    found, model = estimate(run), sketch(run)
    row = wire.frame.length(Weights({name: tensor[:1] for name, tensor in model.trained.items()}))
    assert found.traffic is not None
    assert found.traffic.total[0] == found.traffic.total[1]
    assert found.traffic.total[0].exact
    assert 0 <= found.traffic.total[0].least - 3 * 2 * row <= 6 * 4  # the run's number, as msgpack writes it
    forward = one_pass(model, 2, 32, 32)
    assert found.flops == pytest.approx(forward.flops / 2 * 3 * 2 * 2)  # two steps are the mean of three rounds
    assert found.batch == (2, 32)
    assert found.client is not None
    assert found.server is not None
    assert (found.client.optimiser, found.client.activations) == (0, forward.kept)
    assert found.server.weights == model.weight_bytes + 1000


def test_a_subclass_inherits_what_it_costs(place: Path) -> None:
    one, other = (estimate(run_of(place, method)) for method in (FedAvg(), Mine()))
    assert one.traffic == other.traffic
    assert (one.client, one.server, one.flops) == (other.client, other.server, other.flops)
    assert other.client is not None


def test_the_codec_of_a_whole_update_is_seen(place: Path) -> None:
    runs = [run_of(place, method, lora={"rank": 2}) for method in (FedAvg(), CGFed())]
    (one, other), model = (estimate(run).server for run in runs), sketch(runs[0])
    assert one is not None
    assert other is not None
    assert other.total - one.total == CODECS + IMAGE * model.size - model.largest_bytes
