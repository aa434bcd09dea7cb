"""Evaluation at a client: what it answers to the action `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire import wire
from thinwire.core import Client, Method, StaleVersion
from thinwire.data.batch import Dataset
from thinwire.evaluate.splits import Split, evaluate
from thinwire.runtime.payloads import Scores
from thinwire.wire import Frame, Illegal


@dataclass(frozen=True)
class Evaluation:
    """The action `evaluate`: how the weights that a broadcast means score on a client's rows.

    `data`: client -> the rows that it scores; `heldout`: whether it trains on none of them; `settings`: [eval] of the
    run file; `mean_only`: see Scores.
    """

    data: Mapping[int, Dataset]
    heldout: bool
    settings: Any
    mean_only: bool = False

    def __call__(self, method: Method, frame: Frame, client: Client, spool: Path | None = None) -> Frame:
        """The frame of the client's Scores."""
        header = frame.header()
        try:
            method.receive(wire.decode(method.Down, frame), client)
        except StaleVersion:
            raise Illegal("a broadcast that builds on a version which this client does not hold") from None
        split = Split("sites", self.data[client.id], self.settings.generate)
        found = evaluate(client.net, split, self.settings.batch_size, self.settings.max_new_tokens)
        scores = Scores(found.rows, found.loss, found.accuracy, found.rouge_l, self.heldout, self.mean_only or None)
        return wire.encode(scores, run=header.run, round=header.round, client=client.id)
