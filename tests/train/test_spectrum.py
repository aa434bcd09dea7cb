"""Where the Hessian's eigenvalues lie, the share above a standing threshold, and how alike rows are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import closed_data, tiny_net
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thinwire.data.batch import collate
from thinwire.keys import Key
from thinwire.model.net import Net
from thinwire.model.views import Filter, Prompt
from thinwire.train import spectrum
from thinwire.train.spectrum import FLOOR, alike, density, layer_scores, share_above


class Bowl(nn.Module):
    """A loss whose Hessian is diagonal."""

    def __init__(self, curvature: list[float]) -> None:
        super().__init__()
        self.w, self.curvature = nn.Parameter(torch.ones(len(curvature))), torch.tensor(curvature)


def batch() -> Any:
    from thinwire.data.batch import Batch

    one = torch.zeros((1, 1), dtype=torch.int64)
    return Batch("open", one, one, one, one, 1)


def test_lanczos_finds_the_eigenvalues_and_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bowl([3.0, 3.0, -1.0, 0.25] * 8)
    monkeypatch.setattr(spectrum, "loss", lambda m, b: (m.curvature * m.w.square()).sum() / 2)
    found = density(model, batch(), [model.w], 20, Key.root(0))
    assert found.shape == (2, 3)  # each of them once, and then there is nothing left to find
    np.testing.assert_allclose(found[0], [-1.0, 0.25, 3.0], atol=1e-3)
    np.testing.assert_allclose(found[1], [0.25, 0.25, 0.5], atol=1e-3)
    assert torch.equal(model.w, torch.ones(32))
    assert model.w.grad is None


def test_it_is_the_hessian_of_a_language_model(tmp_path: Path) -> None:
    """Moments of its spectrum against products that autograd makes: v H v, |H v|^2 and (H v) H (H v)."""
    tiny_net(tmp_path)
    net = Net.open(str(tmp_path), view=Prompt(tokens=2))
    parameter = net.parameter(net.names[0])
    closed = closed_data(net, 4, 1)
    rows = collate(closed.examples, 258, closed.candidates)
    key = Key.root(3)
    nodes, shares = density(net.model, rows, [parameter], 12, key)
    signs = np.unpackbits(key.words(1).view(np.uint8), count=64, bitorder="little").astype(np.float64) * 2 - 1
    vector = torch.from_numpy(signs / 8).float().view(parameter.shape)

    def product(direction: torch.Tensor) -> torch.Tensor:
        logits = net.model(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, position_ids=rows.position_ids
        ).logits
        # the scores again, from functions that can be differentiated twice
        width = rows.labels.shape[1]
        log = logits[:, -width - 1 : -1].log_softmax(-1)
        picked = log.gather(2, rows.labels.clamp(min=0)[..., None])[..., 0] * (rows.labels >= 0)
        score = picked.sum(1).view(rows.examples, rows.candidates)
        assert rows.choice is not None
        whole = nn.functional.cross_entropy(score, rows.choice)
        (gradient,) = torch.autograd.grad(whole, parameter, create_graph=True)
        (found,) = torch.autograd.grad((gradient * direction).sum(), parameter)
        return found

    with sdpa_kernel(SDPBackend.MATH):
        first = product(vector)
        second = product(first)
    wanted = [float((vector * first).sum()), float(first.square().sum()), float((first * second).sum())]
    for power, right in enumerate(wanted, 1):
        assert float((shares * nodes**power).sum()) == pytest.approx(right, rel=2e-2, abs=1e-3 * abs(wanted[1]))


def test_the_share_is_that_above_the_threshold_where_it_stands_still() -> None:
    assert share_above(np.array([[-1.0, 5.0], [0.25, 0.75]])) == 0.75
    # 0.3 of it is passed on the way, and what is left then stands still
    assert share_above(np.array([[0.05, 0.15, 4.0], [0.15, 0.15, 0.7]])) == pytest.approx(0.7)
    # most of it is passed by the first step, so the steps are halved until some are too small for that
    assert share_above(np.array([[0.03, 4.0], [0.8, 0.2]])) == pytest.approx(1.0)
    assert share_above(np.array([[-1.0, -2.0], [0.5, 0.5]])) == 0.0
    assert share_above(np.zeros((2, 0))) == 1.0


def test_rows_in_one_direction_are_the_most_alike_and_orthogonal_ones_the_least() -> None:
    generator = torch.Generator().manual_seed(0)
    same, apart = alike(torch.ones(4, 9)), alike(torch.eye(4, 9) * torch.tensor([[3.0], [1.0], [7.0], [0.1]]))
    between = alike(torch.randn((4, 9), generator=generator))
    assert same == pytest.approx(3 * (math.log(FLOOR) + 1 / FLOOR) + math.log(4) + 0.25, rel=1e-4)
    assert apart == pytest.approx(4 * (math.log(1 + FLOOR) + 1 / (1 + FLOOR)))
    assert apart < between < same


@pytest.mark.parametrize("view", [Prompt(tokens=3), Filter()])
def test_a_layer_is_scored_by_its_rows_whatever_pads_them(view: Any, tmp_path: Path) -> None:
    tiny_net(tmp_path)
    net = Net.open(str(tmp_path), view=view)
    stack: Any = net.model.get_submodule("model.layers")
    closed = closed_data(net, 4, 1)
    rows = collate(closed.examples, 258, closed.candidates)
    found = layer_scores(net.model, rows, list(stack))
    states: list[list[torch.Tensor]] = [[], []]
    last: list[Any] = []
    hooks = [module.register_forward_hook(lambda module, args, out: last.append(out)) for module in stack]
    for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True):
        own = ids[mask.bool()][None]
        last.clear()
        with torch.no_grad():
            net.model(input_ids=own)
        for own_states, out in zip(states, last, strict=True):
            hidden = out if isinstance(out, torch.Tensor) else out[0]
            own_states.append(hidden[0, -own.shape[1] :].mean(0))
    for hook in hooks:
        hook.remove()
    assert len(found) == 2
    for score, own_states in zip(found, states, strict=True):
        assert score == pytest.approx(alike(torch.stack(own_states)), rel=1e-2)
    assert not stack[0]._forward_hooks
