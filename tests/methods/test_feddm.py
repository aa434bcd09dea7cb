"""FedDM: what its sets stand for, what the server makes of them, what travels, and whom it refuses."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import PROMPT, Federation, closed_data, tiny_net
from tiny import CHOICES, tiny_encoder, tiny_folder, tiny_rows, write_jsonl
from torch import Tensor

from thinwire import assemble, config, wire
from thinwire.data.batch import Batch, collate
from thinwire.data.tokenise import tokenise
from thinwire.errors import ConfigError
from thinwire.keys import Key
from thinwire.methods.feddm import Distilled, FedDM
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train import embedded, objective

SMALL: dict[str, Any] = {"rows": 2, "length": 4, "steps": 3, "batch_size": 4, "server_steps": 2}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    net = tiny_net(tmp_path_factory.mktemp("model"))
    net.reset()
    return net


def gradients(net: Net, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for _, p in net.parameters()]))


def a_batch(net: Net, choices: tuple[str, ...]) -> tuple[Batch, Tensor, Any]:
    """A row with words, and the same as points."""
    data = tokenise(tiny_rows(3, 5, closed=True), PROMPT, net.tokenizer, max_length=64, choices=choices)
    batch = collate(data.examples[:1], data.pad, data.candidates)
    words = torch.tensor([data.examples[0].prompt])
    return batch, net.model.get_input_embeddings()(words).detach(), data.candidates


def test_real_rows_as_points_have_their_scores_and_gradients(net: Net) -> None:
    net.reset()
    batch, points, answers = a_batch(net, CHOICES)
    assert batch.kind == "choice"
    found, expected = embedded.scores(net.model, points, answers), objective.scores(net.model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # a lookup's own gradient is not in the points': of the others D is nothing
    frozen = net.model.get_input_embeddings().weight
    rest = [p for _, p in net.parameters() if p is not frozen]
    assert batch.choice is not None
    mine = torch.autograd.grad(embedded.losses(net.model, points, batch.choice, answers).mean(), rest)
    wanted = torch.autograd.grad(objective.loss(net.model, batch), rest)
    assert float(embedded.distance(mine, wanted)) < 1e-6
    assert float(embedded.distance([2 * g for g in wanted], wanted)) == pytest.approx(1, rel=1e-4)


def test_answers_of_one_token_and_classes_are_scored_too(net: Net, tmp_path: Path) -> None:
    points = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    single = embedded.scores(net.model, points, ((65,), (66,)))
    several = embedded.scores(net.model, points, ((65, 70), (66, 70)))
    logits = net.model(inputs_embeds=points).logits[:, -1]
    torch.testing.assert_close(single, torch.log_softmax(logits[:, [65, 66]], -1))
    first = torch.log_softmax(logits, -1)[:, [65, 66]]
    assert (several < first).all()  # a token more, of log-probability below 0
    encoder = Net.open(str(tiny_encoder(tmp_path / "encoder")), classes=("a", "b", "c"), head_key=Key.root(0))
    assert embedded.scores(encoder.model, points, ((), (), ())).exp().sum(1).tolist() == pytest.approx([1] * 3)


def test_the_gradient_of_the_distance_is_its_slope(net: Net) -> None:
    """Adam's first step is lr times the sign of the slope, which differences of D itself have too, in float64."""
    model = copy.deepcopy(net.model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(1)
    rows, answers = torch.randn(2, 3, 32, generator=draw, dtype=torch.float64), ((65, 66), (70,))
    label = torch.tensor([1, 1])
    real = torch.randn(2, 5, 32, generator=draw, dtype=torch.float64)
    wanted = list(torch.autograd.grad(embedded.losses(model, real, label, answers).mean(), parameters))

    def apart(points: Tensor) -> float:
        mine = torch.autograd.grad(embedded.losses(model, points, label, answers).mean(), parameters)
        return float(embedded.distance(mine, wanted))

    after, first = embedded.matched(model, parameters, rows, 1, answers, iter([wanted]), 1e-3)
    assert first == pytest.approx(apart(rows), rel=1e-3)
    for place in ((0, 0, 0), (1, 2, 31), (0, 1, 7)):
        step = torch.zeros_like(rows)
        step[place] = 1e-2
        slope = apart(rows + step) - apart(rows - step)
        assert float((after - rows)[place]) * slope < 0
    _, last = embedded.matched(model, parameters, rows, 1, answers, iter([wanted] * 40), 3e-2)
    assert last < 0.8 * first


def test_the_servers_step_is_the_weighted_gradient_of_the_sets(net: Net, tmp_path: Path) -> None:
    method = FedDM(**(SMALL | {"server_steps": 1}), optimiser="sgd", lr=0.1)
    federation = Federation(method, net, tmp_path, rounds=1)
    ups = [
        (
            id,
            wire.decode(
                method.Up,
                wire.encode(
                    method.client_update(
                        method.broadcast(federation.state, federation.server(1, (0, 1, 2)), id, None),
                        federation.client(id, 1),
                    )
                ),
            ),
        )
        for id in range(3)
    ]
    state, metrics = method.aggregate(federation.state, federation.server(1, (0, 1, 2)), iter(ups))
    after = {name: t.clone() for name, t in state.weights.items()}
    net.reset()
    total = [torch.zeros_like(p) for _, p in net.parameters()]
    answers = federation.data[0].candidates
    assert answers is not None
    value = 0.0
    for id, up in ups:
        for (label, rows), count in zip(up.sets.items(), up.counts, strict=True):
            assert count == sum(e.choice == int(label) for e in federation.data[id].examples)
            loss = embedded.losses(net.model, rows.float(), torch.full((2,), int(label)), answers).mean()
            value += count / 36 * loss.item()
            for one, gradient in zip(total, gradients(net, loss), strict=True):
                one += count / 36 * gradient
    assert metrics["surrogate"] == pytest.approx(value, rel=1e-5)
    for (name, parameter), gradient in zip(net.parameters(), total, strict=True):
        torch.testing.assert_close(after[name], parameter.detach() - 0.1 * gradient, rtol=0, atol=1e-5)


def test_the_sets_have_the_gradient_of_what_they_stand_for_and_are_not_real_rows(net: Net, tmp_path: Path) -> None:
    """Sets begin as noise, end with the gradient of all real rows of their class, and far from any token."""
    method, table = FedDM(rows=4, length=8, steps=20), net.base["model.embed_tokens.weight"]
    federation = Federation(method, net, tmp_path, rounds=1, sizes=(64,))
    down = method.broadcast(federation.state, federation.server(1, (0,)), 0, None)
    up, data = method.client_update(down, federation.client(0, 1)), federation.data[0]
    assert up.distance < 0.1
    assert data.candidates is not None
    for label, rows in up.sets.items():
        own = [example for example in data.examples if example.choice == int(label)]
        wanted = gradients(net, objective.loss(net.model, collate(own, data.pad, data.candidates)))
        labels = torch.full((4,), int(label))
        found = gradients(net, embedded.losses(net.model, rows.float(), labels, data.candidates).mean())
        one, other = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, wanted))
        assert float(torch.cosine_similarity(one, other, dim=0)) > 0.95
        assert torch.cdist(rows.float().flatten(0, 1), table).min() > 0.3 * table.std() * 32**0.5


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_the_ball_bounds_both_halves(rho: float, net: Net, tmp_path: Path) -> None:
    method = FedDM(**(SMALL | {"server_steps": 20}), lr=1e-2, rho=rho)
    federation = Federation(method, net, tmp_path, rounds=1)
    down = method.broadcast(federation.state, federation.server(1, (0,)), 0, None)
    method.client_update(down, federation.client(0, 1))
    away = sum(float((p.detach() - net.base[n]).square().sum()) for n, p in net.parameters()) ** 0.5
    assert away == pytest.approx(rho, rel=1e-3)
    federation.run()
    moved = sum(float((t - net.base[n]).square().sum()) for n, t in federation.state.weights.items()) ** 0.5
    assert moved == pytest.approx(rho, rel=1e-3) if rho else moved > 0.2


def test_bytes_up_do_not_depend_on_the_models_depth(tmp_path: Path) -> None:
    sizes = []
    for layers in (1, 3):
        net = tiny_net(tmp_path / str(layers), num_hidden_layers=layers)
        at = Federation(FedDM(**SMALL), net, tmp_path / f"run{layers}", rounds=1).step()
        sizes.append(at.visits[0].bytes_up)
    assert sizes[0] == sizes[1]
    assert 0 < sizes[0] - 2 * 2 * 4 * 32 * 2 < 300  # two classes of two rows, of four tokens, 32 wide, in two bytes


def test_a_table_that_nothing_but_lookups_read_is_left_out(tmp_path: Path) -> None:
    """Points are not looked up: the table has no gradient of theirs, and stays where the server's steps find it."""
    net = tiny_net(tmp_path / "untied", tie_word_embeddings=False)
    federation = Federation(FedDM(**SMALL), net, tmp_path / "run", rounds=1)
    answers = ((65,), (66,))  # of one token, which nothing follows that would be looked up
    federation.data = [dataclasses.replace(data, candidates=answers) for data in federation.data]
    visits = federation.step().visits
    assert [visits[client].error for client in visits] == [None] * 3
    assert 0 < federation.metrics["distance"] < 2
    table = "model.embed_tokens.weight"
    moved = {name for name, tensor in federation.state.weights.items() if not torch.equal(tensor, net.base[name])}
    assert moved == {*net.names} - {table}


@pytest.mark.parametrize(
    ("view", "line"),
    [
        ({"kind": "tied", "numbers": 8, "targets": ["q_proj"]}, "feddm compares the weights' gradients, and tied "),
        ({"kind": "filter", "parts": ["embed_tokens"]}, "what is trained has no gradient where rows are points"),
    ],
)
def test_what_points_cannot_teach_is_refused(view: dict[str, Any], line: str, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", tie_word_embeddings=False)
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(20, closed=True))
    data = {"path": str(tmp_path / "rows.jsonl"), "clients": 2, "prompt": "{input}:", "answer": "{output}"}
    tree: dict[str, Any] = {
        "rounds": 1,
        "model": {"path": str(tmp_path / "model"), "view": view},
        "data": data | {"words": dict(zip(CHOICES, "ab", strict=True)), "choices": ["a", "b"]},
        "method": {"name": "feddm"},
    }
    from thinwire.runtime.course import Watch, train

    (tmp_path / "run").mkdir()
    with pytest.raises(ModelError, match=rf"^model\.view: {line}"):
        train(assemble.begin(*assemble.prepared(config.parse(tree))).job(tmp_path / "run", Watch()))


def good(net: Net) -> Distilled:
    answers = torch.tensor([[65, 66], [70, -1]], dtype=torch.int32)
    return Distilled(
        {"0": torch.zeros(2, 4, 32).half(), "1": torch.ones(2, 4, 32).half()}, [5, 3], answers, 0.5, 8, 1.0
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sets": {}}, "not of 2 classes"),
        ({"sets": {"2": torch.zeros(2, 4, 32).half()}, "counts": [8]}, "not of 2 classes"),
        ({"sets": {"x": torch.zeros(2, 4, 32).half()}, "counts": [8]}, "not of 2 classes"),
        ({"counts": [8]}, "one for each set"),
        ({"counts": [8, 0]}, "one for each set"),
        ({"sets": {"0": torch.zeros(2, 4, 31).half()}, "counts": [8]}, "set of class 0 is torch.float16"),
        ({"sets": {"0": torch.zeros(2, 4, 32)}, "counts": [8]}, "set of class 0 is torch.float32"),
        ({"sets": {"0": torch.full((2, 4, 32), torch.inf).half()}, "counts": [8]}, "not finite"),
        ({"answers": torch.tensor([[65], [300]], dtype=torch.int32)}, "no tokens"),
        ({"answers": torch.tensor([[65], [-1]], dtype=torch.int32)}, "no tokens"),
        ({"answers": torch.tensor([[65], [-2]], dtype=torch.int32)}, "no tokens"),
        ({"answers": torch.tensor([[65]], dtype=torch.int32)}, "not the model's"),
        ({"answers": torch.zeros(2, 0, dtype=torch.int32)}, "not the model's"),
        ({"answers": torch.zeros(2, 1)}, "answers are torch.float32"),
        ({"distance": float("nan")}, "distance of nan"),
    ],
)
def test_what_a_client_may_not_answer(change: dict[str, Any], reason: str, net: Net, tmp_path: Path) -> None:
    federation = Federation(FedDM(**SMALL), net, tmp_path)
    federation.method.check(federation.state, 0, good(net))
    with pytest.raises(wire.Illegal, match=reason):
        federation.method.check(federation.state, 0, dataclasses.replace(good(net), **change))


def test_counts_that_lie_count_no_more_than_the_examples(net: Net, tmp_path: Path) -> None:
    method = FedDM(**SMALL)
    federation = Federation(method, net, tmp_path)
    states = []
    for factor in (1, 10**6):
        up = dataclasses.replace(good(net), counts=[5 * factor, 3 * factor])
        other = dataclasses.replace(good(net), sets={"0": torch.ones(2, 4, 32).half()}, counts=[8])
        state, _ = method.aggregate(federation.state, federation.server(1, (0, 1)), iter([(0, up), (1, other)]))
        states.append(bytes(wire.encode(state)))
    assert states[0] == states[1]


def test_open_answers_are_refused_in_one_line(net: Net, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(20, closed=True))
    tree: dict[str, Any] = {
        "rounds": 1,
        "model": {"path": str(net.folder)},
        "data": {"path": str(tmp_path / "rows.jsonl"), "clients": 2, "prompt": "{input}:", "answer": " {output}"},
        "method": {"name": "feddm"},
    }
    start = assemble.begin(*assemble.prepared(config.parse(tree)))
    from thinwire.runtime.course import Watch

    with pytest.raises(ConfigError, match=r"^data\.choices: missing; feddm is for a closed set") as error:
        start.job(tmp_path / "run", Watch())
    assert "\n" not in str(error.value)
    closed = closed_data(net, 8, 0)
    federation = Federation(FedDM(**SMALL), net, tmp_path / "federation")
    federation.data = [dataclasses.replace(closed, candidates=None)] * 3
    assert "open" in str(federation.step().visits[0].error)
