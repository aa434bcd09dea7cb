"""Accuracy over a closed set of answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from thinwire.data.batch import Dataset
from thinwire.train.objective import scores


@torch.inference_mode()
def accuracy(model: nn.Module, dataset: Dataset, batch_size: int) -> tuple[float, float, list[int]]:
    """The share of examples whose likeliest candidate is right, the mean loss of the right one, and what was predicted.

    Predictions are indices into the candidates, in the data set's order; of equal scores the first wins.
    ValueError: the data set is empty or its answers are open.
    """
    predictions, mean = predict(model, dataset, batch_size)
    right = sum(found == example.choice for found, example in zip(predictions, dataset.examples, strict=True))
    return right / len(predictions), mean, predictions


@torch.inference_mode()
def predict(model: nn.Module, dataset: Dataset, batch_size: int) -> tuple[list[int], float]:
    """The likeliest candidate of each example, in the data set's order, and the mean loss of the right ones."""
    if not dataset.examples or dataset.candidates is None:
        raise ValueError("accuracy needs at least one example and a closed set of answers")
    total = 0.0
    found: dict[int, int] = {}  # by identity: batches come in another order than the examples
    for batch, examples in dataset.in_order(batch_size):
        marks = scores(model, batch)
        assert batch.choice is not None
        total += F.cross_entropy(marks.double(), batch.choice.to(marks.device), reduction="sum").item()
        found.update(zip((id(example) for example in examples), marks.argmax(1).tolist(), strict=True))
    return [found[id(example)] for example in dataset.examples], total / len(dataset)
