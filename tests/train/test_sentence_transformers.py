"""Our steps on pairs are those of sentence-transformers, where it is installed."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, tiny_encoder

from thinwire import assemble, config
from thinwire.data.rows import Row
from thinwire.evaluate.retrieval import retrieved
from thinwire.keys import Key
from thinwire.train.local import Rule, train_locally

theirs: Any = pytest.importorskip("sentence_transformers")
STEPS, SIZE, LR = 20, 6, 1e-3


def rows(negatives: bool) -> list[Row]:
    order = Key.root(1).permutation(12)
    each = [{"anchor": f"{a} {i}", "positive": f"the {WORDS[order[i % 12]]} {i}"} for i, a in enumerate(WORDS * 2)]
    more = [{"negative": f"a {WORDS[order[-i % 12]]}"} if negatives else {} for i in range(24)]
    return [Row(fields | other, "pairs.jsonl", i) for i, (fields, other) in enumerate(zip(each, more, strict=True))]


@pytest.mark.parametrize("negatives", [False, True])
def test_twenty_steps_have_their_losses(negatives: bool, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    tree = {"data": {"path": "none", "loss": "contrastive", "max_length": 64}, "method": {"name": "fedavg"}}
    run = config.parse(tree | {"model": {"path": str(tiny_encoder(tmp_path / "encoder"))}})
    net, given = assemble.net_of(run), rows(negatives)
    net.save(tmp_path / "saved")  # with how it pools
    data = assemble.client_data(run, given, net)
    places = [list(range(at, at + SIZE)) for at in range(0, len(given), SIZE)]
    mine: list[float] = []
    batches = (data.collated([data.examples[i] for i in some]) for some in cycle(places))
    train_locally(net.model, [p for _, p in net.parameters()], batches, Rule("adamw", LR, STEPS), losses=mine)

    model = theirs.SentenceTransformer(str(tmp_path / "saved"), device="cpu").eval()  # no dropout
    loss, optimiser = MultipleNegativesRankingLoss(model), torch.optim.AdamW(model.parameters(), LR, weight_decay=0)
    found: list[float] = []
    for _, some in zip(range(STEPS), cycle(places), strict=False):
        columns = [[given[i].fields[name] for i in some] for name in given[0].fields]
        value = loss([model.preprocess(column) for column in columns], None)
        found.append(float(value.detach()))
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert found[-1] < found[0] - 0.1
    assert mine == pytest.approx(found, abs=1e-4)

    net.save(tmp_path / "trained")
    again = theirs.SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    texts = {str(i): row.fields["positive"] for i, row in enumerate(given)}
    evaluator = InformationRetrievalEvaluator(
        {str(i): row.fields["anchor"] for i, row in enumerate(given)},
        texts,
        {name: {name} for name in texts},
        mrr_at_k=[len(texts)],
        show_progress_bar=False,
    )
    scores = {name.partition("cosine_")[2]: value for name, value in evaluator(again).items()}
    ours = retrieved(net.model, data, 8)
    assert (ours.recall_1, ours.recall_10) == (scores["accuracy@1"], scores["accuracy@10"])
    assert ours.mrr == pytest.approx(scores[f"mrr@{len(texts)}"], abs=1e-6)
