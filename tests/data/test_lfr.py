"""LFR: which rows a pass is about, the losses that it goes by, and that a share of 1 is the plain order."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, closed_data, tiny_net
from tiny import tiny_rows

from thinwire import assemble, config, wire
from thinwire.core import Method
from thinwire.data.batch import Dataset
from thinwire.data.lfr import LOSSES, PASSES, Learnt
from thinwire.data.templates import Template
from thinwire.data.tokenise import tokenise
from thinwire.keys import Key
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.model.net import Net
from thinwire.train.objective import example_losses, loss

KEY = Key.root(3)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["open", "choice", "balanced", "packed"])
def data(request: pytest.FixtureRequest, net: Net) -> Dataset:
    if request.param in ("choice", "balanced"):
        return dataclasses.replace(closed_data(net, 23, 5), balanced=request.param == "balanced")
    rows = tokenise(tiny_rows(23, 5), Template("{input}:", " {output}"), net.tokenizer, max_length=64)
    return dataclasses.replace(rows, pack=64 if request.param == "packed" else 0)


def shown(data: Dataset, count: int, size: int = 4) -> list[bytes]:
    return [batch.input_ids.numpy().tobytes() for batch in islice(data.batches(KEY, size), count)]


def test_a_share_of_one_is_the_plain_order_bit_for_bit(data: Dataset) -> None:
    memory: dict[str, torch.Tensor] = {}
    focussed = dataclasses.replace(data, focus=1.0).remembered(memory)
    for _ in range(3):  # visits
        assert shown(focussed, 20) == shown(data, 20)
    assert memory[PASSES] > 3
    assert shown(dataclasses.replace(data, focus=0.3).remembered({}), 20) != shown(data, 20)
    assert dataclasses.replace(data, focus=None).remembered({}).memory is None


def test_passes_learn_focus_and_review(data: Dataset) -> None:
    """Each pass, by the losses that were recorded in those before it; a row's loss is made to be its length."""
    memory: dict[str, torch.Tensor] = {}
    focussed, passes = dataclasses.replace(data, focus=0.4).remembered(memory), list[set[int]]()
    groups = data._groups()
    real = Learnt.record

    def record(self: Learnt, rows: Any, each: torch.Tensor) -> None:
        passes[int(self.memory[PASSES]) - 1 :] = [{*(passes[-1] if len(passes) == self.memory[PASSES] else ()), *rows}]
        real(self, rows, each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learnt, "record", record)
        for batch in focussed.batches(KEY, 4):
            if len(passes) == 5 and int(memory[PASSES]) == 6:
                break
            assert isinstance(batch.seen, partial)
            rows = batch.seen.args[0]
            batch.seen(torch.tensor([float(len(data.examples[i])) + i / 100 for i in rows]))
    losses = [len(example) + i / 100 for i, example in enumerate(data.examples)]
    hard = set[int]()
    for group in groups:
        hard |= set(sorted(group, key=lambda i: -losses[i])[: math.ceil(0.4 * len(group))])
    every = set(range(len(data)))
    assert passes[:5] == [every, hard, every, hard, every]
    torch.testing.assert_close(memory[LOSSES], torch.tensor(losses))


def test_what_has_not_been_trained_on_is_the_least_learnt() -> None:
    memory: dict[str, torch.Tensor] = {}
    learnt = Learnt(memory, 6)
    assert not learnt.begin()
    learnt.record([0, 1, 4], torch.tensor([1.0, 9.0, math.nan]))
    assert learnt.begin()
    assert learnt.hardest([range(6)], 0.5, KEY) in ([2, 3, 4], [2, 3, 5], [2, 4, 5], [3, 4, 5])
    assert learnt.hardest([range(6)], 5 / 6, KEY) == [1, 2, 3, 4, 5]
    assert len({tuple(learnt.hardest([range(6)], 0.5, KEY.fold(n))) for n in range(20)}) == 4
    assert Learnt(memory, 6).memory[LOSSES][1] == 9
    assert Learnt(memory, 7).memory[LOSSES].isnan().all()  # other rows
    assert not Learnt(memory, 7).begin()


def test_the_losses_are_those_of_the_pass_that_trains(net: Net, data: Dataset) -> None:
    memory: dict[str, torch.Tensor] = {}
    net.reset()
    batch = next(dataclasses.replace(data, focus=0.5).remembered(memory).batches(KEY, 4))
    plain = dataclasses.replace(batch, seen=None)
    calls: list[int] = []
    handle = net.model.register_forward_hook(lambda *_: calls.append(1))
    found = loss(net.model, batch)
    handle.remove()
    assert torch.equal(found, loss(net.model, plain))
    assert len(calls) == 1  # and no other
    assert isinstance(batch.seen, partial)
    rows = batch.seen.args[0]
    each = example_losses(net.model, plain)[0].detach()
    wanted = torch.full((len(data),), math.nan)
    wanted[rows] = each
    torch.testing.assert_close(memory[LOSSES], wanted, equal_nan=True)


METHODS: dict[str, Method] = {
    "fedavg": FedAvg(lr=3e-3, steps=3, batch_size=4),
    "fedkseed": FedKSeed(lr=2e-4, eps=1e-3, seeds=64, steps=3, batch_size=4),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_under_a_method_it_is_the_same_after_a_resume_and_nothing_of_it_travels(
    name: str, net: Net, tmp_path: Path
) -> None:
    def federation(folder: str, focus: float | None = 0.3, **fields: Any) -> Federation:
        found = Federation(METHODS[name], net, tmp_path / folder, rounds=3, **fields)
        found.data = [dataclasses.replace(data, focus=focus) for data in found.data]
        return found

    whole, plain = federation("whole").run(), federation("plain", None).run()
    half = federation("half").run(2)
    saved = wire.decode(METHODS[name].State, wire.encode(half.state))
    rest = federation("half", state=saved, round=2, held=half.held).run()
    one, ends = federation("one", 1.0).run(), {}
    for run in (rest, whole, plain, one):
        ends[id(run)] = bytes(wire.encode(run.state))
    assert ends[id(rest)] == ends[id(whole)] != ends[id(plain)] == ends[id(one)]
    first, other = whole.history[0].visits[0], plain.history[0].visits[0]
    assert (first.bytes_down, first.bytes_up) == (other.bytes_down, other.bytes_up)
    kept = whole.memories.of(1, 4)
    assert kept[LOSSES].shape == (8,)
    assert int(kept[PASSES]) >= 3
    assert not kept[LOSSES].isnan().all()


def test_a_run_file_asks_for_it_and_only_then_is_another_run() -> None:
    tree: dict[str, Any] = {"data": {"path": "rows.jsonl"}, "method": {"name": "fedavg"}}
    plain = config.parse(tree)
    whole = {"rounds": 10} | tree  # the default, written out
    assert assemble.identity(config.parse(whole)) == assemble.identity(plain)
    lfr = config.parse({**tree, "data": {**tree["data"], "order": "lfr", "focus": 0.3}})
    assert (lfr.data.order, lfr.data.focus) == ("lfr", 0.3)
    assert assemble.identity(lfr) != assemble.identity(plain)
    for wrong, why in (
        ({"focus": 0.3}, r"data\.focus: goes with data\.order = .lfr. only$"),
        ({"order": "x"}, "order"),
    ):
        with pytest.raises(config.ConfigError, match=why) as error:
            config.parse({**tree, "data": {**tree["data"], **wrong}})
        assert "\n" not in str(error.value)
