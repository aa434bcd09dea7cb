"""What a data set is like, for people: how many rows, how long, what was cut, how unlike the clients are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thinwire.data.batch import Dataset
from thinwire.keys import Key

LISTED = 5  # clients that a line names


@dataclass(frozen=True)
class Lengths:
    """Tokens an example, prompt and answer together; `answer` is the median of the answer alone, which is trained."""

    median: float
    p95: float
    max: int
    answer: float


@dataclass(frozen=True)
class Description:
    """A client's rows, or a held-out split's. `labels`: how many of its rows have which label, where there are any."""

    name: str
    rows: int
    cut: int
    dropped: int
    tokens: Lengths
    labels: dict[str, int]


def describe(name: str, data: Dataset, labels: Sequence[str] = ()) -> Description:
    """The description of a data set; `labels` are its rows' before any was dropped."""
    lengths = np.array([len(example) for example in data.examples])
    answers = np.array([len(example.answer) for example in data.examples])
    tokens = Lengths(
        float(np.median(lengths)), float(np.quantile(lengths, 0.95)), int(lengths.max()), float(np.median(answers))
    )
    counts = dict(sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0])))
    return Description(name, len(data) + data.dropped, data.cut, data.dropped, tokens, counts)


def skew(clients: Sequence[Mapping[str, int]]) -> float:
    """How unlike the clients' labels are: 0, all have the same shares of them; 1, each has one label only.

    The mean over all rows of the total variation distance between their client's distribution of labels and that of
    all rows, divided by what it is where each client has one label, 1 - sum_l p_l^2. 0 where there is one label at all.
    """
    names = sorted({name for counts in clients for name in counts})
    table = np.array([[counts.get(name, 0) for name in names] for counts in clients], dtype=np.float64)
    sizes = table.sum(1)
    shares, whole = table / sizes[:, None], table.sum(0) / table.sum()
    most = 1 - (whole**2).sum()
    return float((np.abs(shares - whole).sum(1) / 2 * sizes).sum() / sizes.sum() / most) if most > 0 else 0.0


def shortened(names: Sequence[str], clients: Sequence[Dataset], max_length: int) -> str | None:
    """The line with how many rows were cut or left out, and whose; None where none was."""
    rows = sum(len(data) + data.dropped for data in clients)
    parts = []
    for what, counts in (
        (f"cut to {max_length} tokens", {n: data.cut for n, data in zip(names, clients, strict=True) if data.cut}),
        ("left out as longer", {n: data.dropped for n, data in zip(names, clients, strict=True) if data.dropped}),
    ):
        if counts:
            most = sorted(counts.items(), key=lambda item: -item[1])
            whose = ", ".join(f"{name} {count}" for name, count in most[:LISTED])
            more = f", {len(most) - LISTED} clients more" if len(most) > LISTED else ""
            parts.append(f"{sum(counts.values()):,} of {rows:,} rows {what} ({whose}{more})")
    return "; ".join(parts) or None


def remarks(clients: Sequence[Dataset]) -> list[str]:
    """What people may not expect of the rows' text, a line each: what the chat template does with them."""
    return list(dict.fromkeys(note for data in clients for note in data.notes))


def filled(data: Dataset) -> tuple[int, float]:
    """Of a data set that is packed: the rows of a pass, and the share of their tokens that is not padding."""
    rows, seen = 0, 0
    for batch in data.batches(Key.root(0), 8):
        rows += len(batch.input_ids)
        seen += batch.examples
        if seen == len(data):
            break
    return rows, sum(map(len, data.examples)) / (rows * data.pack)
