"""Preferences: by how much a model takes chosen answers to be likelier than rejected ones, and the start model did."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from thinwire.data.batch import Dataset
from thinwire.train.objective import margins


@torch.inference_mode()
def measured(model: nn.Module, dataset: Dataset, batch_size: int) -> Dataset:
    """The data set with the margins under this model as its examples' reference."""
    found = _margins(model, dataset, batch_size)
    return replace(
        dataset, examples=tuple(replace(e, reference=m) for e, m in zip(dataset.examples, found, strict=True))
    )


@torch.inference_mode()
def preferred(model: nn.Module, dataset: Dataset, batch_size: int) -> tuple[float, float]:
    """The share of examples whose margin is above its reference, and the mean DPO loss; ValueError without these."""
    references = [e.reference for e in dataset.examples if e.reference is not None]
    if not references or len(references) != len(dataset) or dataset.beta is None:
        raise ValueError("preferences without the start model's reference")
    gains = torch.tensor(_margins(model, dataset, batch_size), dtype=torch.float64) - torch.tensor(references).double()
    return float((gains > 0).double().mean()), float(F.softplus(-dataset.beta * gains).mean())


def _margins(model: nn.Module, dataset: Dataset, batch_size: int) -> list[float]:
    """In the data set's order."""
    found: dict[int, float] = {}  # by identity: batches come in another order than the examples
    for batch, examples in dataset.in_order(batch_size):
        found.update(zip((id(example) for example in examples), margins(model, batch).tolist(), strict=True))
    return [found[id(example)] for example in dataset.examples]
