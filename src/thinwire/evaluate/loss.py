"""The mean loss of a data set."""

from __future__ import annotations

import torch
from torch import nn

from thinwire.data.batch import Dataset
from thinwire.evaluate.choice import accuracy
from thinwire.evaluate.preference import preferred
from thinwire.evaluate.retrieval import retrieved
from thinwire.train.objective import token_losses


@torch.inference_mode()
def mean_loss(model: nn.Module, dataset: Dataset, batch_size: int) -> tuple[float, int]:
    """The mean loss, and the number of terms that it is the mean of.

    Open answers: over all tokens that count, whatever the batches. A closed set of answers, preferences and pairs, each
    among all of them: over the examples. ValueError: there is no such token or example.
    """
    if dataset.candidates is not None:
        _, mean, predictions = accuracy(model, dataset, batch_size)
        return mean, len(predictions)
    if dataset.beta is not None:
        return preferred(model, dataset, batch_size)[1], len(dataset)
    if dataset.scale is not None:
        return retrieved(model, dataset, batch_size).loss, len(dataset)
    total, tokens = 0.0, 0
    for batch, _ in dataset.in_order(batch_size):
        sums, counts = token_losses(model, batch)
        total += sums.double().sum().item()
        tokens += int(counts.sum())
    if tokens == 0:
        raise ValueError("the data set has no answer tokens to evaluate")
    return total / tokens, tokens
