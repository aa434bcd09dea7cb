"""Score a net on a named split, and show what it answers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from thinwire.data.batch import Dataset
from thinwire.evaluate.choice import accuracy, predict
from thinwire.evaluate.loss import mean_loss
from thinwire.evaluate.preference import preferred
from thinwire.evaluate.retrieval import nearest, retrieved
from thinwire.evaluate.text import bleu, exact_match, generate, references, rouge_l
from thinwire.model.net import Net

FEW = 8  # rows that are answered at a time


@dataclass(frozen=True)
class Split:
    """A data set under its name; `generate` is how many of its first rows are answered in text, 0 for none."""

    name: str
    data: Dataset
    generate: int = 0


@dataclass(frozen=True)
class Score:
    """What an evaluation found; accuracy is None for open answers, the scores of texts where nothing was generated.

    Of preferences the accuracy is the share whose chosen answer has gained on the rejected one since the start model.
    Of pairs it is recall@1: the share of anchors to which their own positive is the nearest; see evaluate.retrieval.
    """

    split: str
    loss: float
    perplexity: float
    accuracy: float | None
    rouge_l: float | None
    bleu: float | None
    rows: int
    exact_match: float | None = None
    recall_10: float | None = None
    mrr: float | None = None


@torch.inference_mode()
def evaluate(net: Net, split: Split, batch_size: int = 8, max_new_tokens: int = 64) -> Score:
    """Loss and perplexity of the net's present weights, accuracy over choices or preferences, else scores of texts.

    Perplexity is the exponential of the loss, infinite where that overflows. ValueError: the split has
    nothing to evaluate.
    """
    right, rouge, blue, exact, recall, mrr = None, None, None, None, None, None
    with _eval_mode(net.model):
        if split.data.candidates is not None:
            right, loss, _ = accuracy(net.model, split.data, batch_size)
        elif split.data.scale is not None:
            loss, right, recall, mrr = retrieved(net.model, split.data, batch_size)
        else:
            if split.data.beta is not None:
                right, loss = preferred(net.model, split.data, batch_size)
            else:
                loss, _ = mean_loss(net.model, split.data, batch_size)
            if split.generate > 0:
                found = generate(net.model, net.tokenizer, split.data, max_new_tokens, batch_size, split.generate)
                accepted = references(net.tokenizer, split.data.examples[: split.generate])
                rouge, blue, exact = rouge_l(found, accepted), bleu(found, accepted), exact_match(found, accepted)
    return Score(split.name, loss, _exp(loss), right, rouge, blue, len(split.data), exact, recall, mrr)


@torch.inference_mode()
def answers(net: Net, dataset: Dataset, rows: int, max_new_tokens: int = 64) -> list[str]:
    """The net's answers to the first `rows` examples: the likeliest of a closed set, else greedy text.

    Of pairs the text of the nearest positive of all.
    """
    few = replace(dataset, examples=dataset.examples[:rows])
    if not few.examples:
        return []
    with _eval_mode(net.model):
        if dataset.scale is not None:
            return nearest(net.model, dataset, rows, FEW)
        if few.candidates is None:
            return generate(net.model, net.tokenizer, few, max_new_tokens, FEW)
        found, _ = predict(net.model, few, FEW)
    names = few.choices or tuple(str(net.tokenizer.decode(list(tokens))).strip() for tokens in few.candidates)
    return [names[i] for i in found]


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
