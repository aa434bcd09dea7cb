"""The server's step is its equation, tensor by tensor and on every averaged method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net
from pydantic import TypeAdapter
from torch import Tensor

from thinwire.aggregate.mean import Mean, Update
from thinwire.aggregate.server_step import AnyServerStep, Momentum, Plain, Yogi, stepped
from thinwire.core import Averaged
from thinwire.evaluate.loss import mean_loss
from thinwire.methods import METHODS
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.model.net import Net
from thinwire.model.views import Lora
from thinwire.wire import LazyTensors
from thinwire.wire.payload import Spec

STEP: TypeAdapter[Any] = TypeAdapter(AnyServerStep)
RULES = ("plain", "momentum", "nesterov", "adam", "yogi")


@pytest.mark.parametrize("rule", RULES)
def test_it_is_its_equation(rule: str) -> None:
    step = STEP.validate_python({"kind": rule, "lr": 0.3} | ({"tau": 1e-3} if rule in ("adam", "yogi") else {}))
    generator, memory = torch.Generator().manual_seed(0), dict[str, Tensor]()
    m, v = torch.zeros(32, dtype=torch.float64), torch.full((32,), 1e-6, dtype=torch.float64)
    for _ in range(3):
        delta = torch.randn(32, generator=generator) * 1e-3
        ours, memory = step(memory, "w", delta)
        d = delta.double()
        if rule == "plain":
            expected = 0.3 * d
        elif rule in ("momentum", "nesterov"):
            m = 0.9 * m + d
            expected = 0.3 * (m if rule == "momentum" else 0.9 * m + d)
        else:
            m = 0.9 * m + 0.1 * d
            v = 0.99 * v + 0.01 * d**2 if rule == "adam" else v - 0.01 * d**2 * torch.sign(v - d**2)
            expected = 0.3 * m / (v.sqrt() + 1e-3)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-9)


def test_a_plain_whole_step_ends_at_the_mean_to_the_bit() -> None:
    weights, mean = torch.randn(99).bfloat16(), torch.randn(99)
    after, memory = stepped(Plain(), {"w": weights}, {"w": mean.clone()}, None)
    assert torch.equal(after["w"], mean.bfloat16())
    assert memory is None


def test_its_name_alone_will_do_and_what_is_none_is_refused() -> None:
    assert STEP.validate_python("yogi") == Yogi()
    with pytest.raises(ValueError, match=r"plain.*momentum"):
        STEP.validate_python("adagrad")
    with pytest.raises(ValueError, match="tau"):
        STEP.validate_python({"kind": "momentum", "tau": 1.0})


def test_the_fields_of_older_run_files_are_read() -> None:
    old = {"name": "gradualdiff", "server_lr": 0.5, "momentum": 0.8, "second_moment": 0.9, "tau": 1e-4}
    assert GradualDiff.model_validate(old | {"server": "average"}).server_step == Plain(lr=0.5)
    assert GradualDiff.model_validate(old | {"server": "momentum"}).server_step == Momentum(lr=0.5, momentum=0.8)
    yogi = GradualDiff.model_validate(old | {"server": "yogi"})
    assert yogi.server_step == Yogi(lr=0.5, momentum=0.8, second_moment=0.9, tau=1e-4)
    assert GradualDiff.model_validate(yogi.model_dump()) == yogi
    again = GradualDiff.model_validate(yogi.model_dump() | {"server_lr": 0.25})
    assert again.server_step == Yogi(lr=0.25, momentum=0.8, second_moment=0.9, tau=1e-4)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"server": [1]}, r"server is \[1\], not one of average, momentum, adam, yogi"),
        ({"server": "adagrad"}, "server is 'adagrad', not one of"),
        ({"server": "adam", "server_step": [1]}, r"server_step is \[1\], not a table"),
        ({"server_lr": 1.0, "server_step": 5}, "server_step is 5, not a table"),
        ({"server": "average", "tau": -1}, "tau is -1: Input should be greater than 0"),
        ({"server_step": "adam", "server_lr": "x"}, "server_lr is 'x': Input should be a valid number"),
    ],
)
def test_what_older_run_files_could_not_say_is_refused_by_their_names(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        GradualDiff.model_validate(fields)


def test_the_mean_is_over_those_that_hold_a_tensor() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    updates = [(0, Update({"a": one, "b": one}, 1, loss=2.0)), (1, Update({"a": two}, 3, skipped=2))]
    mean, metrics = Mean()(updates)
    assert mean["a"].tolist() == [2.5, 5.0]
    assert mean["b"].tolist() == [1.0, 2.0]
    assert metrics == {"loss": 2.0, "skipped": 2}
    assert Mean()([]) == ({}, {})


MEANS = [n for n, cls in METHODS.items() if issubclass(cls, Averaged) and type(cls().aggregation) is Mean]


@pytest.mark.parametrize("name", sorted(MEANS))
def test_it_moves_every_method_that_takes_a_mean(name: str, tmp_path: Path) -> None:
    """Momentum of 0 with rate 1 ends where the mean is; half the rate ends elsewhere; the state travels with it."""
    if name in ("cgfed", "tgap"):
        tiny_net(tmp_path / "model")
        view = Lora(rank=4, alpha=8.0, targets=("q_proj",))
        net = Net.open(str(tmp_path / "model"), remember=True, view=view)
    else:
        net = tiny_net(tmp_path / "model")
    few: dict[str, Any] = {"steps": 2, "lr": 1e-3 if name in ("fedkseed", "fedzo") else 1e-2}
    few |= {"cgfed": {"ratio": 16}, "fedcybgd": {"blocks": 2}}.get(name, {})

    def after(step: dict[str, Any]) -> tuple[float, Any]:
        method = METHODS[name](**few, server_step=step)
        federation = Federation(method, net, tmp_path / str(len(list(tmp_path.iterdir()))), rounds=2).run()
        method.materialise(federation.state, net)
        return mean_loss(net.model, federation.data[0], 16)[0], federation.state

    plain, _ = after({"kind": "plain"})
    same, state = after({"kind": "momentum", "momentum": 0.0})
    half, _ = after({"kind": "plain", "lr": 0.25})
    assert same == pytest.approx(plain, rel=1e-4)
    assert abs(half - plain) > 1e-6
    moments = state.first if name == "gradualdiff" else state.moments
    assert moments


def test_a_plain_step_reads_no_weights_of_before() -> None:
    """They lie in a file: of the largest tensor that would be as much memory again."""

    def read(name: str) -> Tensor:
        raise AssertionError(name)

    before = LazyTensors({"w": Spec(torch.bfloat16, (3,))}, read)
    after, memory = stepped(Plain(), before, {"w": torch.tensor([1.0, 2.0, 3.0])}, None)
    assert (after["w"].dtype, after["w"].tolist(), memory) == (torch.bfloat16, [1.0, 2.0, 3.0], None)
