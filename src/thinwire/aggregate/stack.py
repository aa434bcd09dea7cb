"""All updates kept, one below another: for a server that needs each client's factors, not their mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from thinwire.aggregate.mean import Aggregation, Metrics, Reports, Setting, Update


class Stack(Aggregation):
    """The updates' tensors along their first dimension, in the order in which they are counted, in their dtypes."""

    kind: Literal["stack"] = "stack"

    def __call__(
        self, updates: Iterable[tuple[int, Update]], at: Setting | None = None
    ) -> tuple[dict[str, Tensor], Metrics]:
        """[sum of the updates' rows, ...] by name, and the updates' mean loss and skipped steps."""
        parts: dict[str, list[Tensor]] = {}
        reports = Reports()
        for _, update in updates:
            for name, tensor in update.tensors.items():
                parts.setdefault(name, []).append(tensor.detach().clone())
            reports.add(update)
        return {name: torch.cat(rows) for name, rows in parts.items()}, reports.metrics if parts else {}
