"""What an example adds to a step is bounded, whoever the others are; and the noise is on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import closed_data, tiny_net
from numpy.typing import NDArray
from tiny import tiny_folder, tiny_rows
from torch import Tensor

from thinwire.data.batch import Dataset
from thinwire.data.templates import Template
from thinwire.data.tokenise import tokenise
from thinwire.keys import Key
from thinwire.model.net import Net
from thinwire.model.views.full import Full
from thinwire.model.views.lora import Lora
from thinwire.model.views.tied import Tied
from thinwire.perturb.directions import Directions
from thinwire.perturb.probe import Probe
from thinwire.privacy.protection import Protection
from thinwire.train.each_example import EachExample
from thinwire.train.objective import example_losses
from thinwire.train.protected import UNITS, Protected, singles

TARGETS = ("q_proj", "v_proj", "down_proj")
VIEWS = {
    "lora": Lora(rank=2, targets=TARGETS),
    "tied": Tied(numbers=50, rank=2, targets=TARGETS),
    "weights": Tied(numbers=50, over="weights"),
    "full": Full(),
}


class Quiet:
    """Secrets without noise that draw all examples, or those named."""

    def __init__(self, drawn: Sequence[int] | None = None) -> None:
        self.drawn, self.deviations = drawn, list[float]()

    def normal(self, shape: Sequence[int], scale: float) -> Tensor:
        self.deviations.append(scale)
        return torch.zeros(tuple(shape), dtype=torch.float64)

    def sampled(self, count: int, rate: float) -> NDArray[np.int64]:
        return np.arange(count) if self.drawn is None else np.array(self.drawn, np.int64)

    def integers(self, count: int, deviation: int) -> NDArray[np.int64]:
        self.deviations.append(deviation)
        return np.zeros(count, np.int64)


def net_of(folder: Path, view: Any) -> Net:
    tiny_folder(folder)
    net = Net.open(str(folder), "float32", remember=True, view=view, view_key=Key.root(3))
    with torch.no_grad():  # or B's zeros would hide A's gradients
        for _, parameter in net.trained():
            parameter.add_(
                torch.from_numpy(0.02 * Key.root(1).uniform(parameter.numel()) - 0.01).view(parameter.shape).float()
            )
    return net


def open_data(net: Net, rows: int) -> Dataset:
    return tokenise(tiny_rows(rows, 5), Template("{input}:", " {output}"), net.tokenizer, max_length=64)


def preferences(net: Net, rows: int) -> Dataset:
    """Each of them with an answer of another row as the rejected one."""
    data = open_data(net, rows)
    answers = [e.answer for e in data.examples]
    examples = [
        replace(e, rejected=other, reference=0.3 * i)
        for i, (e, other) in enumerate(zip(data.examples, [*answers[1:], answers[0]], strict=True))
    ]
    return replace(data, examples=tuple(examples), beta=0.5)


DATA = {"open": open_data, "closed": lambda net, rows: closed_data(net, rows, 1), "preferences": preferences}


def slow(net: Net, data: Dataset, clip: float, size: int) -> list[Tensor]:
    """The definition: each example's gradient alone, shortened, summed, over the size."""
    parameters = [p for _, p in net.trained()]
    sums = [torch.zeros_like(p) for p in parameters]
    for batch in Protected(data, size, Protection("record", clip, 1.0), Quiet()).batches(1).__next__():
        example_losses(net.model, batch)[0].backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient * min(1.0, clip / length)
        for p in parameters:
            p.grad = None
    return [total / size for total in sums]


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("view", VIEWS)
def test_the_gradient_is_the_mean_of_shortened_ones(view: str, kind: str, tmp_path: Path) -> None:
    net = net_of(tmp_path, VIEWS[view])
    data = DATA[kind](net, 7)
    parameters = [p for _, p in net.trained()]
    for clip in (1e-3, 0.3, 1e3):
        secrets = Quiet()
        protected = Protected(data, 4, Protection("record", clip, 2.0), secrets)
        found = protected.clipped_gradient(net.model, parameters, next(protected.batches(3)))
        for one, other in zip(found, slow(net, data, clip, 4), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6 * clip)
        assert secrets.deviations == [2.0 * clip] * len(parameters)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize(("view", "together"), [("lora", True), ("tied", True), ("weights", False), ("full", False)])
def test_small_views_need_one_backward_pass_a_batch(view: str, together: bool, tmp_path: Path) -> None:
    net = net_of(tmp_path, VIEWS[view])
    assert (EachExample.of(net.model, [p for _, p in net.trained()]) is not None) == together


def test_without_examples_a_step_is_noise_alone(tmp_path: Path) -> None:
    net = net_of(tmp_path, VIEWS["lora"])
    protected = Protected(open_data(net, 5), 2, Protection("record", 1.0, 1.0), Quiet([]))
    pieces = next(protected.batches())
    assert pieces == []
    assert not any(g.any() for g in protected.clipped_gradient(net.model, [p for _, p in net.trained()], pieces))
    assert protected.noised_slopes([], 3).tolist() == [0, 0, 0]


def test_no_example_moves_a_slope_beyond_the_bound(tmp_path: Path) -> None:
    """Neighbouring sets of rows: all, and without each row in turn, derivatives a thousand times what they are."""
    net = tiny_net(tmp_path)
    data, clip = closed_data(net, 6, 1), 0.05

    def sums(drawn: Sequence[int]) -> NDArray[np.float64]:
        protected, slopes = Protected(data, 3, Protection("record", clip, 1.0), Quiet(drawn)), []
        with Probe(net, Directions(7, "sign")) as probe:
            for batch in next(protected.batches(4)):
                found = probe.pairs(batch, [0, 1], 1e-3)
                slopes.append(1e3 * (found[:, 0] - found[:, 1]) / 2e-3)
        return protected.noised_slopes(slopes, 2).astype(np.float64) * 3

    parts = [float(np.linalg.norm(sums(range(6)) - sums([j for j in range(6) if j != i]))) for i in range(6)]
    assert max(parts) <= clip * (1 + 1e-5)
    assert max(parts) >= clip - 2 * clip / UNITS  # some row is shortened to the bound: without it this would be more


def test_what_is_not_finite_adds_nothing(tmp_path: Path) -> None:
    net = tiny_net(tmp_path)
    protected = Protected(closed_data(net, 4, 1), 2, Protection("record", 1.0, 1.0), Quiet())
    slopes = torch.tensor([[0.5, math.nan, math.inf], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert protected.noised_slopes([slopes], 2).tolist() == [0.25, 0.0]


@pytest.mark.parametrize("kind", DATA)
def test_an_example_alone_has_the_loss_that_it_has_among_others(kind: str, tmp_path: Path) -> None:
    net = tiny_net(tmp_path)
    data = DATA[kind](net, 5)
    (batch,) = next(Protected(data, 5, Protection("record", 1.0, 1.0), Quiet()).batches())
    with torch.no_grad():
        among = example_losses(net.model, batch)[0]
        alone = torch.stack([example_losses(net.model, one)[0, 0] for one in singles(batch)])
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-6)
    assert [one.input_ids.shape[1] for one in singles(replace(batch))] != [batch.input_ids.shape[1]] * 5
