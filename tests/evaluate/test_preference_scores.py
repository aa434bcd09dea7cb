"""How held-out preferences are scored, against the formula by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import EOS, PAD, tiny_folder

from thinwire.data.batch import Dataset, Example
from thinwire.evaluate.loss import mean_loss
from thinwire.evaluate.preference import measured, preferred
from thinwire.evaluate.splits import Split, answers, evaluate
from thinwire.model.net import Net

TEXTS = [("hello", "good day", "go"), ("a", "b", "a long answer"), ("one more", "yes", "no"), ("who", "me", "not me")]


def tokens(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


DATA = Dataset(
    tuple(Example(tokens(p), (*tokens(a), EOS), references=(a,), rejected=(*tokens(b), EOS)) for p, a, b in TEXTS),
    pad=PAD,
    beta=0.2,
)


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return Net.open(str(tiny_folder(tmp_path / "m")))


def by_hand(net: Net, example: Example) -> float:
    """log p(chosen) - log p(rejected), from each row alone and all its logits."""
    sums = []
    for answer in (example.answer, example.rejected):
        ids = torch.tensor([example.prompt + answer])
        logs = net.model(ids).logits[0].double().log_softmax(-1)
        places = range(len(example.prompt) - 1, ids.shape[1] - 1)
        sums.append(sum(float(logs[i, ids[0, i + 1]]) for i in places))
    return sums[0] - sums[1]


@torch.no_grad()
def test_the_scores_are_the_formula(net: Net) -> None:
    begun = measured(net.model, DATA, 3)
    assert [e.reference for e in begun.examples] == pytest.approx([by_hand(net, e) for e in DATA.examples], abs=1e-3)
    assert evaluate(net, Split("held", begun), 3).accuracy == 0  # a tie is no gain
    assert mean_loss(net.model, begun, 3) == (pytest.approx(math.log(2), abs=1e-9), 4)

    for _, parameter in net.parameters():
        parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel())).view(parameter.shape))
    gains = [by_hand(net, e) - (e.reference or 0) for e in begun.examples]
    right, value = preferred(net.model, begun, 2)
    assert right == sum(gain > 0 for gain in gains) / 4
    assert 0 < right < 1
    assert value == pytest.approx(sum(math.log1p(math.exp(-0.2 * gain)) for gain in gains) / 4, abs=1e-3)
    found = evaluate(net, Split("held", begun, generate=2), 2, max_new_tokens=3)
    assert (found.accuracy, found.loss, found.rows) == (right, value, 4)
    assert found.rouge_l is not None
    assert len(answers(net, begun, 2, 3)) == 2


def test_nothing_is_scored_without_the_start_models_share(net: Net) -> None:
    some = measured(net.model, DATA, 4).examples
    for data in (DATA, replace(DATA, examples=()), replace(DATA, examples=(*some, DATA.examples[0]))):
        with pytest.raises(ValueError, match="reference"):
            preferred(net.model, data, 2)
