"""Stages: merged weights are float64's rounded once, by whatever way one comes to them, and nothing is lost by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, closed_data
from tiny import tiny_encoder, tiny_folder
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from thinwire import wire
from thinwire.compress.coding import Coding
from thinwire.compress.feedback import DEBT
from thinwire.keys import Key
from thinwire.methods.onebit import MISSED, NUMBERS, OneBit
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.views import Core, Filter, Lora, Tied, factors
from thinwire.model.views.merging import moved
from thinwire.runtime.store import VersionStore
from thinwire.train.objective import loss
from thinwire.train.stages import LEVELS, Stages, arrive, check_merges, check_stages, grown, numbers_of, settle
from thinwire.wire import Illegal

TARGETS = ("q_proj", "down_proj")
VIEWS: dict[str, Any] = {
    "lora": Lora(rank=3, alpha=6.0, targets=TARGETS),
    "half of lora": Lora(rank=3, alpha=6.0, targets=TARGETS, freeze_a=True),
    "core": Core(rank=4, alpha=8.0, targets=TARGETS),
    "tied": Tied(numbers=300, targets=TARGETS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(params=list(VIEWS))
def view(request: pytest.FixtureRequest) -> Any:
    return VIEWS[request.param]


def opened(folder: Path, view: Any, dtype: str = "float32", seed: int = 0) -> Net:
    return Net.open(str(folder), dtype, view=view, view_key=Key.root(seed))


def some(net: Net, seed: int, size: float = 0.05) -> Tensor:
    """Numbers on the levels that all hold."""
    drawn = torch.randn(net.size, generator=torch.Generator().manual_seed(seed)) * size
    return LEVELS.decode(LEVELS.encode(drawn, 0), drawn.shape, 0)


def after(net: Net, count: int) -> Stages:
    stages: Stages = {}
    for seed in range(count):
        stages = grown(stages, some(net, seed), plain=False)
    return stages


def computed(net: Net) -> Tensor:
    """What the layers compute with, in float64: W + scale B C A of the parameters as they are."""
    found = []
    net.view.refresh(net.model)
    for name in factors.places(net.model):
        layer: Any = net.model.get_submodule(name)
        left, right, *core = (factor.weight.detach().double() for factor in layer.factors)
        product = right @ (core[0] @ left if core else left)
        found.append((layer.base_layer.weight.detach().double() + layer.scale * product).flatten())
    return torch.cat(found)


def held(net: Net) -> Tensor:
    """The weights that the factors stand beside."""
    return torch.cat([net.model.get_parameter(p.weight).detach().flatten() for p in factors.places(net.model).values()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_merged_is_float64s_product_rounded_once(view: Any, dtype: str, folder: Path) -> None:
    net = opened(folder, view, dtype)
    arrive(net, {}, some(net, 0))
    wanted = computed(net)
    arrive(net, after(net, 1), torch.zeros(net.size))
    rounded = wanted.to(getattr(torch, dtype))
    # two sums of a few float64 products differ in the last bits, which rounds otherwise hardly ever
    assert (held(net) != rounded).float().mean() < 1e-3
    assert torch.allclose(held(net).double(), wanted, rtol=2**-8 if dtype == "bfloat16" else 2**-23, atol=1e-12)
    assert not torch.equal(held(net), held(opened(folder, view, dtype)))


def test_a_layer_that_lies_turned_over_is_merged_alike(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40))
    factors.add(model, 2, 4.0, ["c_attn"], Key.root(0))
    layer: Any = model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        layer.factors[1].weight.normal_()
    left, right = (factor.weight.detach().double() for factor in layer.factors)
    wanted = layer.weight.detach().double() + layer.scale * (right @ left).T
    assert torch.allclose(moved(layer, layer.weight.detach()).double(), wanted, rtol=2**-23, atol=1e-12)


def test_a_merge_changes_no_loss(view: Any, folder: Path) -> None:
    net = opened(folder, view)
    batch = next(closed_data(net, 8, 1).batches(Key.root(1), 8))

    def measured() -> float:
        with torch.no_grad():
            return float(loss(net.model, batch))

    start = measured()
    arrive(net, {}, some(net, 0))
    before = measured()
    arrive(net, after(net, 1), torch.zeros(net.size))
    assert measured() == pytest.approx(before, rel=1e-5)
    assert abs(before - start) > 1e-4


def test_all_ways_there_end_at_the_same_bits(view: Any, folder: Path) -> None:
    one, other = opened(folder, view), opened(folder, view)
    stages, numbers = after(one, 3), some(one, 9)
    for count in range(3):  # as who was there all the time
        arrive(one, {f"stage/{i}": stages[f"stage/{i}"] for i in range(count)}, some(one, count))
    arrive(one, stages, numbers)
    arrive(other, stages, numbers)
    digest = one.state_sha256()
    assert other.state_sha256() == digest
    arrive(other, after(other, 1), some(other, 5))  # and back to a stage before
    assert other.state_sha256() != digest
    arrive(other, stages, numbers)
    assert other.state_sha256() == digest
    assert opened(folder, view, seed=1).state_sha256() != opened(folder, view).state_sha256()


def test_after_a_reset_nothing_is_merged(view: Any, folder: Path) -> None:
    net = opened(folder, view)
    digest = net.state_sha256()
    arrive(net, after(net, 2), some(net, 7))
    assert net.state_sha256() != digest
    net.reset()
    assert net.state_sha256() == digest


def test_each_stage_has_a_draw_of_its_own(view: Any, folder: Path) -> None:
    """The same numbers mean other weights there: else a stage would move along what the one before it has had."""
    net = opened(folder, view)
    numbers, found = some(net, 0), []
    for count in range(3):
        arrive(net, after(net, count), torch.zeros(net.size))
        start = held(net).double()
        arrive(net, after(net, count), numbers)
        found.append(computed(net) - start)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(torch.cosine_similarity(found[i], found[j], dim=0)) < 0.6  # of some dozens of numbers
        assert found[i].norm() == pytest.approx(float(found[j].norm()), rel=0.3)


def test_what_is_interrupted_does_not_pass_for_merged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, other = (opened(folder, VIEWS["lora"]) for _ in range(2))
    stages, write = after(net, 1), Net.write

    def stops(self: Net, name: str, tensor: Tensor) -> None:
        if "down_proj" in name:
            raise KeyboardInterrupt
        write(self, name, tensor)

    monkeypatch.setattr(Net, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        arrive(net, stages, some(net, 3))
    monkeypatch.setattr(Net, "write", write)
    for one in (net, other):
        arrive(one, stages, some(one, 3))
    assert net.state_sha256() == other.state_sha256()


def test_an_exported_model_has_the_merged_weights(view: Any, folder: Path, tmp_path: Path) -> None:
    net = opened(folder, view)
    arrive(net, after(net, 2), some(net, 7))
    net.save(tmp_path / "out")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(Net.open(str(tmp_path / "out")).model(ids).logits, net.model(ids).logits, atol=1e-4)
    assert not (tmp_path / "out" / "adapter").exists()


def test_stages_that_are_none_are_refused() -> None:
    stage = grown({}, torch.ones(300), plain=False)["stage/0"]
    assert torch.equal(numbers_of(stage, 300), LEVELS.decode(LEVELS.encode(torch.ones(300), 0), (300,), 0))
    assert torch.equal(numbers_of(grown({}, torch.ones(300) / 3, plain=True)["stage/0"], 300), torch.ones(300) / 3)
    for wrong in ({"stage/1": stage}, {"0": stage}, {"stage/0": stage[:-1]}, {"stage/0": stage.float()}):
        with pytest.raises(Illegal, match="stage"):
            check_stages(wrong, 300)
    with pytest.raises(Illegal, match="beyond"):
        check_stages(grown({}, torch.full((300,), 1e9), plain=False), 300)


def test_what_cannot_be_merged_is_refused_in_a_line(folder: Path, tmp_path: Path) -> None:
    for view, why in (
        (Filter(), "this view has none"),
        (Tied(numbers=30, over="weights"), "this view has none"),
        (Lora(rank=2, targets=TARGETS, keep=("*.B",)), "goes with no model.view.keep"),
    ):
        with pytest.raises(ModelError, match=f"method.merge_every: .*{why}"):
            OneBit(merge_every=2).fits(opened(folder, view))
    OneBit().fits(opened(folder, Filter()))
    encoder = tiny_encoder(tmp_path / "encoder")
    net = Net.open(str(encoder), view=Lora(rank=2, targets=("query",)), classes=("a", "b"), head_key=Key.root(0))
    with pytest.raises(ModelError, match="trains its head"):
        check_merges(net, "method.merge_every")


# of a run

ONEBIT = OneBit(lr=1e-2, steps=3, batch_size=4, schedule="constant", merge_every=3)


@pytest.mark.parametrize(("code", "every"), [("sign", 4), ("none", 3)])
def test_all_ends_hold_the_same_bits_at_every_round(
    view: Any, code: Any, every: int, folder: Path, tmp_path: Path
) -> None:
    """The server, who is always there, who was away for five rounds, and who comes late, each with a net of its own."""
    method = ONEBIT.model_copy(update={"code": Coding(name=code), "merge_every": every})
    run = Federation(method, opened(folder, view), tmp_path / "run", rounds=12)
    run.versions = VersionStore(tmp_path / "versions", 64)
    nets = {id: opened(folder, view) for id in range(3)}
    came: list[tuple[int, int, int]] = []  # round, client, stages sent whole
    for round, cohort in enumerate([(0,), (0, 1), *[(0,)] * 5, (0, 1), (0,), (0, 1, 2)], 1):
        for id in cohort:
            client = run.client(id, round)
            client.net = nets[id]
            down = method.broadcast(run.state, run.server(round, cohort), id, run.held.get(id))
            came.append((round, id, len(down.stages or {})))
            method.receive(wire.decode(method.Down, wire.encode(down)), client)
        method.materialise(run.state, run.net)
        digests = {net.state_sha256() for net in [run.net, *(nets[id] for id in cohort)]}
        assert len(digests) == 1, round
        run.step(cohort)
        assert all(visit.error is None for visit in run.history[-1].visits.values())
    # client 1 has missed six changes and one merge, MISSED, or with two merges more than are kept
    assert MISSED == 6 + 1
    assert (8, 1, 0 if every == 4 else 2) in came
    assert (10, 2, 9 // every) in came
    assert len(run.state.stages) == 9 // every


def test_debts_and_moments_end_with_their_stage(folder: Path, tmp_path: Path) -> None:
    run = Federation(ONEBIT, opened(folder, VIEWS["tied"]), tmp_path, rounds=8)
    for round in range(1, 5):
        owed, memory = run.state.owed.clone(), run.memories.of(0, round)
        steps = int(memory.get("moments/steps", torch.tensor(0)))
        assert steps == (0 if round == 1 else 3 * (round - 1))
        run.step()
        if round == 3:
            assert owed.any()
            assert not run.state.owed.any()
            assert not run.state.numbers.any()
        after = run.memories.of(0, round + 1)
        assert int(after["moments/steps"]) == (3 if round == 4 else 3 * round)
        assert after[DEBT].any()


def test_a_memory_of_another_stage_is_settled_once() -> None:
    one = torch.ones(3)
    memory = {DEBT: one, "moments/steps": one, "moments/first/x": one, "kept/x": one}
    settle(memory, 0)
    assert len(memory) == 4
    settle(memory, 2)
    assert set(memory) == {"kept/x", "stage"}
    memory[DEBT] = one
    settle(memory, 2)
    assert DEBT in memory


def test_a_newcomer_gets_a_byte_a_number_of_every_stage(folder: Path, tmp_path: Path) -> None:
    method = ONEBIT.model_copy(update={"merge_every": 4})
    run = Federation(method, opened(folder, VIEWS["tied"]), tmp_path, rounds=12)
    for _ in range(9):
        run.step((0,))
    down = method.broadcast(run.state, run.server(10, (2,)), 2, None)
    assert down.stages is not None
    assert down.levels is not None
    assert [len(each) for each in (*down.stages.values(), down.levels)] == 3 * [LEVELS.size(300)]
    client = run.client(2, 10)
    method.receive(down, client)
    assert client.held == run.state.version
    assert torch.equal(client.versions.get(client.held)[NUMBERS], run.state.numbers)  # type: ignore[index]


def test_a_run_that_ends_with_a_stage_does_not_merge_it(folder: Path, tmp_path: Path) -> None:
    run = Federation(ONEBIT, opened(folder, VIEWS["tied"]), tmp_path, rounds=3).run()
    assert run.state.stages is None
    assert run.state.numbers.any()
