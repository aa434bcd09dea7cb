"""A client seen from outside: what it answers, and what an answer leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net

from thinwire import wire
from thinwire.core import Client
from thinwire.evaluate.clients import Evaluation
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.runtime.endpoint import ACTIONS, Endpoint
from thinwire.runtime.inprocess import InProcess
from thinwire.runtime.payloads import Hello, Ready, Scores
from thinwire.runtime.round import Reply
from thinwire.runtime.survey import Survey
from thinwire.wire import Illegal

EVAL = SimpleNamespace(batch_size=4, generate=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_net(tmp_path_factory.mktemp("model"))


class Remembers(FedAvg):
    """Its clients count their visits, and hold what they were last sent."""

    def client_update(self, down: Any, client: Client) -> Any:
        client.memory["visits"] = client.memory.get("visits", torch.zeros(1)) + 1
        return super().client_update(down, client)


def endpoint(federation: Federation, done: list[int]) -> Endpoint:
    data: Mapping[int, Any] = dict(enumerate(federation.data))
    actions = {**ACTIONS, "evaluate": Evaluation(data, False, EVAL)}
    return Endpoint(federation.method, federation.seats, actions, lambda client: done.append(client.id))


def broadcast(federation: Federation, client: int, round: int) -> wire.Frame:
    server = federation.server(round, (client,))
    down = federation.method.broadcast(federation.state, server, client, None)
    return wire.encode(down, run=5, round=round, client=client)


def test_training_keeps_the_memory_and_evaluating_leaves_no_trace(net: Any, tmp_path: Path) -> None:
    done: list[int] = []
    federation = Federation(Remembers(steps=1, batch_size=4), net, tmp_path)
    client = endpoint(federation, done)
    up = client.answer("train", broadcast(federation, 2, 1))
    assert up.header().kind == "Trained"
    assert federation.memories.newest == {2: 1}
    scores = wire.decode(Scores, client.answer("evaluate", broadcast(federation, 2, 1)))
    ready = client.answer("join", wire.encode(Hello(), run=5, client=2))
    assert wire.decode(Ready, ready) == Ready()
    assert (ready.header().run, ready.header().client) == (5, 2)
    assert scores.examples == 16
    assert (done, federation.memories.newest) == ([2], {2: 1})
    client.answer("train", broadcast(federation, 2, 2))
    assert federation.memories.of(2, 3)["visits"] == 2


def test_a_frame_that_cannot_be_used_leaves_no_memory(net: Any, tmp_path: Path) -> None:
    done: list[int] = []
    federation = Federation(Remembers(steps=1, batch_size=4), net, tmp_path)
    client, good = endpoint(federation, done), bytes(broadcast(federation, 0, 1))
    for action in ("train", "evaluate"):
        (reply,) = InProcess(client).exchange([(0, wire.Frame(good[:-1] + bytes([good[-1] ^ 1])))], action)
        assert reply.frame is None
        assert "Corrupt" in str(reply.error)
    assert (done, federation.memories.newest) == ([], {})


def test_clients_score_the_state_that_they_are_sent(net: Any, tmp_path: Path) -> None:
    federation = Federation(FedAvg(steps=1, batch_size=4, lr=1e-2), net, tmp_path).run(1)
    transport = InProcess(endpoint(federation, []))
    survey = Survey(transport, federation.method, 5, tmp_path)
    (row,) = survey(federation.state, federation.server(1, (0, 1, 2)), federation.held)
    from thinwire.evaluate.splits import Split, evaluate

    federation.method.materialise(federation.state, net)
    examples = [example for data in federation.data for example in data.examples]
    whole = evaluate(net, Split("all", replace(federation.data[0], examples=examples)))
    assert row["loss"] == pytest.approx(whole.loss, rel=1e-5)
    assert (row["split"], row["rows"], row["sites"]) == ("sites_train", 36, 3)
    alone = [evaluate(net, Split("one", data)) for data in federation.data]
    assert [each["loss"] for each in row["each"]] == pytest.approx([one.loss for one in alone], rel=1e-5)
    assert [(each["id"], each["name"], each["rows"]) for each in row["each"]] == [
        (0, "0", 12),
        (1, "1", 8),
        (2, "2", 16),
    ]
    assert row["bytes_down"] > 3 * 4 * net.size
    assert 0 < row["bytes_up"] < 1000


class Answers:
    """Clients with these scores."""

    def __init__(self, *scores: Scores) -> None:
        self.scores = scores

    def exchange(self, frames: Any, action: str = "train") -> Any:
        for client, frame in frames:
            yield Reply(client, wire.encode(self.scores[client], run=5, round=frame.header().round, client=client))


def test_who_lets_its_scores_into_a_mean_alone_has_no_line(net: Any, tmp_path: Path) -> None:
    federation = Federation(FedAvg(steps=1), net, tmp_path)
    server, names = federation.server(1, (0, 1, 2)), ["north", "south", "east"]

    def survey(*withheld: int) -> dict[str, Any]:
        scores = [Scores(10, float(i), None, None, True, True if i in withheld else None) for i in range(3)]
        transport: Any = Answers(*scores)
        (row,) = Survey(transport, federation.method, 5, tmp_path, names)(federation.state, server, {})
        return row

    row = survey()
    assert ([each["name"] for each in row["each"]], row["loss"], "withheld" in row) == (names, 1.0, False)
    row = survey(1, 2)
    assert ([each["name"] for each in row["each"]], row["loss"], row["sites"]) == (["north"], 1.0, 3)
    assert row["withheld"] == ["south", "east"]
    row = survey(2)  # the mean of all, and the others one by one, would reveal it
    assert ([each["name"] for each in row["each"]], row["loss"], row["sites"]) == (["north", "south"], 0.5, 2)
    assert (row["withheld"], row["errors"]) == (["east"], {"2": "the only one whose scores are for a mean alone"})


def test_a_method_whose_clients_never_receive_the_model_is_not_asked(tmp_path: Path) -> None:
    survey = Survey(None, FedCyBGD(), 5, tmp_path)  # type: ignore[arg-type]
    assert survey(None, None, {}) == []  # type: ignore[arg-type]
    assert FedAvg().evaluates()


def test_a_version_that_is_not_held_is_no_answer(net: Any, tmp_path: Path) -> None:
    from thinwire.core import StaleVersion

    class Forgets(FedAvg):
        def receive(self, down: Any, client: Client) -> None:
            raise StaleVersion

    federation = Federation(Forgets(steps=1), net, tmp_path)
    with pytest.raises(Illegal, match="does not hold"):
        endpoint(federation, []).answer("evaluate", broadcast(federation, 0, 1))
