"""Retrieval: how near an anchor's own positive is to it among all positives of a data set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from thinwire.data.batch import Dataset
from thinwire.train.objective import contrasts, embeddings


class Retrieval(NamedTuple):
    """The mean loss of the pairs among all of them; the share of anchors whose positive is the nearest, or among the
    ten nearest; the mean of one over its rank (MRR)."""

    loss: float
    recall_1: float
    recall_10: float
    mrr: float


@torch.inference_mode()
def retrieved(model: nn.Module, dataset: Dataset, batch_size: int) -> Retrieval:
    """How the model finds the data set's positives, all of which are searched; equal ones are one text.

    Another positive of the same anchor is no miss: it is left aside. One as near as an anchor's own stands before it.
    """
    if dataset.scale is None:
        raise ValueError("no pairs")
    vectors = _vectors(model, dataset, batch_size)
    cosines, own = _cosines(dataset, vectors)
    ranks = (~(cosines < cosines.gather(1, own[:, None]))).sum(1).double()  # what is not a number is before all
    loss = contrasts(vectors, dataset.scale).mean()
    first, ten = ((ranks <= k).double().mean() for k in (1, 10))
    return Retrieval(float(loss), float(first), float(ten), float((1 / ranks).mean()))


@torch.inference_mode()
def nearest(model: nn.Module, dataset: Dataset, rows: int, batch_size: int) -> list[str]:
    """To each of the first anchors the positive of the data set that is nearest to it, as text."""
    cosines, own = _cosines(dataset, _vectors(model, dataset, batch_size), aside=False)
    texts = {place: e.references[0] for place, e in zip(own.tolist(), dataset.examples, strict=True)}
    return [texts[place] for place in cosines[:rows].argmax(1).tolist()]


def _cosines(dataset: Dataset, vectors: Tensor, aside: bool = True) -> tuple[Tensor, Tensor]:
    """Of each anchor with each different positive, float64 [examples, positives]; and the place of its own among these.

    With `aside` it is below all for other positives of the same anchor.
    """
    places: dict[tuple[int, ...], int] = {}
    own = [places.setdefault(e.answer, len(places)) for e in dataset.examples]
    firsts = {place: i for i, place in reversed([*enumerate(own)])}
    cosines = vectors[:, 0] @ vectors[[firsts[place] for place in range(len(places))], 1].T
    if aside:
        right: dict[tuple[int, ...], set[int]] = {}
        for e, place in zip(dataset.examples, own, strict=True):
            right.setdefault(e.prompt, set()).add(place)
        for i, (e, place) in enumerate(zip(dataset.examples, own, strict=True)):
            cosines[i, list(right[e.prompt] - {place})] = -torch.inf
    return cosines, torch.tensor(own)


def _vectors(model: nn.Module, dataset: Dataset, batch_size: int) -> Tensor:
    """In the data set's order: float64 [examples, texts, width], on the CPU."""
    found: dict[int, Tensor] = {}  # by identity: batches come in another order than the examples
    for batch, examples in dataset.in_order(batch_size):
        each = embeddings(model, batch).double().cpu().unflatten(0, (batch.examples, batch.candidates))
        found.update(zip((id(example) for example in examples), each, strict=True))
    return torch.stack([found[id(example)] for example in dataset.examples])
