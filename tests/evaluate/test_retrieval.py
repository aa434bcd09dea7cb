"""Retrieval scores against ranks that are counted by hand."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from tiny import WORDS, tiny_encoder

from thinwire.data.batch import Dataset, Example
from thinwire.evaluate.loss import mean_loss
from thinwire.evaluate.retrieval import nearest, retrieved
from thinwire.evaluate.splits import Split, answers, evaluate
from thinwire.model.net import Net
from thinwire.train.objective import embeddings


def example(anchor: str, positive: str, negative: str = "") -> Example:
    texts = (tuple(text.encode()) for text in (anchor, positive))
    return Example(*texts, references=(positive,), rejected=tuple(negative.encode()), apart=True)


def data(*examples: Example) -> Dataset:
    return Dataset(examples, pad=258, scale=20.0)


PLAIN = data(*(example(f"{word} {i}", f"of {WORDS[(5 * i + 3) % 12]}") for i, word in enumerate(WORDS)))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return Net.open(tiny_encoder(tmp_path_factory.mktemp("retrieval") / "encoder"), embeds=True)


def by_hand(net: Net, dataset: Dataset) -> list[int]:
    """The rank of each anchor's own text among all different ones, without other right ones of the same anchor."""

    @functools.cache
    def vector(tokens: tuple[int, ...]) -> torch.Tensor:
        alone = Example(tokens, tokens, apart=True)
        with torch.no_grad():
            return embeddings(net.model, data(alone).collated([alone]))[0]

    ranks = []
    for e in dataset.examples:
        right = {o.answer for o in dataset.examples if o.prompt == e.prompt}
        texts = {o.answer for o in dataset.examples} - right | {e.answer}
        cosines = {text: float(vector(e.prompt) @ vector(text)) for text in texts}
        ranks.append(1 + sum(cosines[text] > cosines[e.answer] for text in texts))
    return ranks


def test_the_scores_are_those_of_the_ranks(net: Net) -> None:
    ranks = by_hand(net, PLAIN)
    assert len({*ranks}) > 3
    for size in (1, 5, 64):
        found = retrieved(net.model, PLAIN, size)
        assert found.recall_1 == pytest.approx(sum(rank <= 1 for rank in ranks) / 12)
        assert found.recall_10 == pytest.approx(sum(rank <= 10 for rank in ranks) / 12)
        assert found.mrr == pytest.approx(sum(1 / rank for rank in ranks) / 12)


def test_equal_texts_are_one_and_other_right_ones_are_no_miss(net: Net) -> None:
    few = PLAIN.examples[:6]
    doubled = data(*few, *(replace(e, prompt=(*e.prompt, 33)) for e in few))
    several = data(*few, *(example(WORDS[i] + f" {i}", f"the other {i}") for i in range(3)))
    for found in (doubled, several):
        ranks = by_hand(net, found)
        assert retrieved(net.model, found, 8).mrr == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))


def test_who_tells_nothing_apart_finds_nothing(net: Net) -> None:
    """A model for which all texts are one, or are no numbers, must not come out as perfect."""

    class Same(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.tensor([value]))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            return type("Out", (), {"last_hidden_state": self.one.expand(*input_ids.shape, 4)})

    for value in (1.0, math.nan):
        found = retrieved(Same(value), PLAIN, 4)
        assert (found.recall_1, found.recall_10, found.mrr) == (0, 0, pytest.approx(1 / 12))


def test_a_split_is_scored_and_shown_by_it(net: Net) -> None:
    found, score = retrieved(net.model, PLAIN, 8), evaluate(net, Split("heldout", PLAIN))
    assert (score.loss, score.accuracy, score.recall_10, score.mrr) == pytest.approx(tuple(found))
    assert mean_loss(net.model, PLAIN, 3) == (pytest.approx(found.loss), 12)
    assert score.rouge_l is None
    shown = answers(net, PLAIN, 4)
    assert shown == nearest(net.model, PLAIN, 4, 2)
    firsts = [rank == 1 for rank in by_hand(net, PLAIN)[:4]]
    assert [text == e.references[0] for text, e in zip(shown, PLAIN.examples, strict=False)] == firsts


def test_other_rows_are_no_pairs(net: Net) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        retrieved(net.model, replace(PLAIN, scale=None), 2)
