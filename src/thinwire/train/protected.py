"""A client's examples, each of which is protected: secret batches, and what each adds to a step within a bound.

A step's batch has each of the n examples with probability q = batch_size / n, drawn from the operating system, so that
it may be of any size. Each example's part v_k is shortened to the bound C, and the step goes along

    (sum_k v_k min(1, C / |v_k|) + noise) / batch_size                   DP-SGD: Abadi et al. 2016, arXiv:1607.00133

v_k is its gradient (`clipped_gradient`), with normal noise in float64; or, in zeroth order, its derivatives along the
step's directions, which are public, so that a number is released a direction (`noised_slopes`): those travel, and are
integers (see privacy.integers). An example whose part is not finite adds nothing. No step is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thinwire.core import Client
from thinwire.data.batch import Batch, Dataset
from thinwire.privacy.integers import truncated, within
from thinwire.privacy.protection import Protection
from thinwire.privacy.secrets import Secrets
from thinwire.train.each_example import EachExample
from thinwire.train.objective import example_losses

UNITS = 4096  # in a deviation of the noise, of a few numbers
PIECE = 32  # examples that pass together at most, however many a batch has


class Protected:
    """What a client half needs where its examples are protected."""

    def __init__(self, data: Dataset, size: int, protection: Protection, secrets: Secrets) -> None:
        self.data, self.size, self.protection, self.secrets = data, min(size, len(data)), protection, secrets

    @property
    def rate(self) -> float:
        """The probability with which a batch has an example."""
        return self.size / len(self.data)

    def batches(self, each: int = PIECE) -> Iterator[list[Batch]]:
        """A step's batch after another, in pieces of at most `each` examples; none where nobody was drawn."""
        while True:
            picked = self.secrets.sampled(len(self.data), self.rate).tolist()
            picked.sort(key=lambda i: len(self.data.examples[i]))
            yield [
                self.data.collated([self.data.examples[i] for i in picked[at : at + each]])
                for at in range(0, len(picked), each)
            ]

    def noised_slopes(self, slopes: Sequence[Tensor], queries: int) -> NDArray[np.float32]:
        """The mean derivative along each of a step's directions, float32 [queries], of slopes [queries, examples]."""
        unit, total = self.protection.unit(UNITS), np.zeros(queries, np.int64)
        for piece in slopes:
            known = piece.isfinite().all(0)
            for slope in piece[:, known].unbind(1):
                total += truncated(slope, within(float(slope.norm()), self.protection.clip), unit).numpy()
        total += self.secrets.integers(queries, UNITS)
        return (total * (unit / self.size)).astype(np.float32)

    def clipped_gradient(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], pieces: Sequence[Batch]
    ) -> list[Tensor]:
        """The noised mean of the examples' gradients: float32, one a parameter."""
        sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters]
        together = EachExample.of(model, parameters)
        for piece in pieces:
            found = together.gradients(piece) if together is not None else None
            if found is None:
                together = None
                for batch in singles(piece):
                    self._add(sums, _gradients(model, parameters, batch))
            else:
                self._add(sums, found)
        for total in sums:
            noise = self.secrets.normal(total.shape, self.protection.deviation)
            total.add_(noise.to(total.device, torch.float32)).div_(self.size)
        return sums

    def _add(self, sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Some examples more, each shortened to the bound. gradients: [examples, *shape]."""
        lengths = torch.stack([g.flatten(1).double().square().sum(1) for g in gradients]).sum(0).sqrt()
        factors = [within(length, self.protection.clip) for length in lengths.tolist()]
        for total, gradient in zip(sums, gradients, strict=True):
            for factor, each in zip(factors, gradient, strict=True):
                if factor:
                    total.add_(each, alpha=factor)


def _gradients(model: nn.Module, parameters: Sequence[nn.Parameter], batch: Batch) -> list[Tensor]:
    """Of a batch of one example: [1, *shape] in float32."""
    example_losses(model, batch).sum().backward()
    found = [torch.zeros_like(p).float() if p.grad is None else p.grad.float() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return [gradient.unsqueeze(0) for gradient in found]


def protected_at(client: Client, size: int) -> Protected | None:
    """What a client's visit needs in a run whose records are protected; None in another."""
    if client.protection is None or client.protection.level != "record":
        return None
    return Protected(client.data, size, client.protection, client.secrets)


def singles(batch: Batch) -> Iterator[Batch]:
    """The batch's examples, each in a batch of its own, as long as it is."""
    for i in range(batch.examples):
        each = len(batch.input_ids) // batch.examples
        rows = slice(i * each, (i + 1) * each)
        seen = batch.attention_mask[rows].bool().any(0).nonzero().flatten()
        part = slice(int(seen[0]), int(seen[-1]) + 1)
        width = batch.labels.shape[1]
        if batch.kind != "class":  # padded on the left: answers end where the row ends
            width = min(width, part.stop - part.start)
        yield replace(
            batch,
            input_ids=batch.input_ids[rows, part],
            attention_mask=batch.attention_mask[rows, part],
            position_ids=batch.position_ids[rows, part],
            labels=batch.labels[rows, batch.labels.shape[1] - width :],
            examples=1,
            choice=None if batch.choice is None else batch.choice[i : i + 1],
            reference=None if batch.reference is None else batch.reference[i : i + 1],
        )
