"""Embeddings against sentence-transformers: the losses of one client's steps in float32, on the same rows in order.

    python benchmarks/embed.py [model.path=FOLDER] [data.rows=200 ...] [--lr 2e-5] [--steps 20] [--json FILE]

It needs sentence-transformers, which thinwire does not: pip install --no-deps --target FOLDER sentence-transformers,
and PYTHONPATH=FOLDER.

Rows and model are those of recipes/embed-movie-reviews.toml, but all parameters are trained, as its
MultipleNegativesRankingLoss trains them: AdamW without decay, at a constant rate, no dropout. It makes its own tokens.
"""

from __future__ import annotations

import argparse
import time
from itertools import count, islice
from pathlib import Path

import torch
from rows import Row, finish

from thinwire import assemble, config
from thinwire.data.batch import Dataset
from thinwire.keys import Key
from thinwire.model.net import Net
from thinwire.model.resolve import resolve
from thinwire.train.local import Rule, train_locally

RECIPE = Path(__file__).parent.parent / "recipes" / "embed-movie-reviews.toml"
SIZE = 16


def places(rows: int, steps: int) -> list[list[int]]:
    """Which rows each step takes: in order, pass after pass."""
    return [[i % rows for i in range(at * SIZE, (at + 1) * SIZE)] for at in islice(count(), steps)]


def ours(net: Net, data: Dataset, steps: int, lr: float) -> list[float]:
    """The losses of our steps."""
    found: list[float] = []
    batches = (data.collated([data.examples[i] for i in some]) for some in places(len(data), steps))
    train_locally(net.model, [p for _, p in net.parameters()], batches, Rule("adamw", lr, steps), losses=found)
    return found


def theirs(folder: Path, data: Dataset, scale: float, longest: int, steps: int, lr: float) -> list[float]:
    """The losses of sentence-transformers' steps, on the texts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(str(folder), device="cpu").eval()
    model.max_seq_length = longest
    loss = MultipleNegativesRankingLoss(model, scale=scale)
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=0)
    texts = [(e.text, e.references[0]) for e in data.examples]
    found: list[float] = []
    for some in places(len(data), steps):
        value = loss([model.preprocess(list(column)) for column in zip(*(texts[i] for i in some), strict=True)], None)
        found.append(float(value.detach()))
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
    return found


def main() -> None:
    """All rows."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--lr", type=float, default=2e-5)
    asked.add_argument("--json")
    known, words = asked.parse_known_args()
    run = config.load(RECIPE, ["data.clients=1", "data.heldout=0", "data.rows=200", *words])
    plain = run.model_copy(update={"model": run.model.model_copy(update={"lora": None, "view": config.Full()})})
    net = assemble.net_of(plain)
    rows = next(iter(assemble.rows_of(run.data, Key.root(run.seed)).clients.values()))
    data = assemble.client_data(plain, rows, net)
    began = time.perf_counter()
    mine = ours(net, data, known.steps, known.lr)
    middle = time.perf_counter()
    their = theirs(resolve(run.model.path), data, run.data.scale, run.data.max_length, known.steps, known.lr)
    ended = time.perf_counter()
    lines = [Row(f"loss, step {i}", a, b, "nats") for i, (a, b) in enumerate(zip(mine, their, strict=True), 1)]
    most = max(abs(line.ours - line.reference) for line in lines)
    lines.append(Row("largest difference of the losses, of 1e-4 allowed", most, 1e-4, "nats"))
    lines.append(Row("seconds", middle - began, ended - middle, "s"))
    finish(lines)
    if most > 1e-4:
        raise SystemExit("the losses differ by more than 1e-4")


if __name__ == "__main__":
    main()
