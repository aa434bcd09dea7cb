"""How a run is scored: held-out splits, public prompts, and the function that answers them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from thinwire.assemble.datasets import check_context, check_tokens, scored_data
from thinwire.assemble.rows import Rows
from thinwire.config import Run
from thinwire.data import templates
from thinwire.data.batch import Dataset
from thinwire.data.rows import Row
from thinwire.data.tokenise import tokenise
from thinwire.evaluate.loss import mean_loss
from thinwire.evaluate.splits import Split, answers, evaluate
from thinwire.keys import Key
from thinwire.model.net import Net

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 4  # held-out rows whose answers are recorded, for people


def splits_of(run: Run, rows: Rows, net: Net) -> list[Split]:
    """The held-out splits, at most eval.rows of each, the same ones every time; the net is the start model."""
    splits = []
    for name, held in rows.splits.items():
        order = Key.root(run.seed).fold("eval", name).permutation(len(held))
        (data,) = scored_data(run, [[held[i] for i in order]], net)
        splits.append(Split(name, data, run.eval.generate))
    return splits


def prompts_of(run: Run, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The run's public prompts, none of them anybody's row: through the chat template where that is the run's."""
    if not run.eval.prompts:
        return None
    name = "chat" if run.data.template == "chat" and run.data.prompt is None else "completion"
    rows = [Row({"prompt": text, "completion": "-"}, "eval.prompts", i) for i, text in enumerate(run.eval.prompts, 1)]
    return tokenise(rows, templates.named(name), tokenizer, max_length=run.data.max_length)


def loss_on(run: Run, net: Net, data: Dataset | None) -> Callable[[], float] | None:
    """A function that measures the mean loss of the weights in the net on these rows."""
    return None if data is None else lambda: mean_loss(net.model, data, run.eval.batch_size)[0]


def scorer(run: Run, net: Net, splits: list[Split]) -> Callable[[], list[dict[str, Any]]]:
    """A function that scores the weights in the net: one record a split, with the answers to a few rows.

    The first record also has the answers to the public prompts, as `public`. Raises DataError for rows beyond the
    model's context.
    """
    prompts = prompts_of(run, net.tokenizer)
    for split in splits:
        check_context(net.positions, run.model.path, split.data.examples)
    asked = [prompts] if prompts is not None else []
    check_tokens(net, run.model.path, *(split.data for split in splits), *asked)

    def score() -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for split in splits:
            result = evaluate(net, split, run.eval.batch_size, run.eval.max_new_tokens)
            shown = split.data.examples[:SHOWN] if run.eval.show_rows else ()
            given = answers(net, split.data, len(shown), run.eval.max_new_tokens) if shown else []
            samples = [
                {"prompt": e.text, "expected": e.references[0], "answer": answer.strip()}
                for e, answer in zip(shown, given, strict=True)
            ]
            # JSON has no infinity: a perplexity beyond all numbers is null.
            finite = {k: None if v == math.inf else v for k, v in asdict(result).items()}
            records.append({**finite, "samples": samples})
        if prompts is not None and records:
            given = answers(net, prompts, len(prompts), run.eval.max_new_tokens)
            pairs = zip(run.eval.prompts, given, strict=True)
            records[0]["public"] = [{"prompt": prompt, "answer": answer.strip()} for prompt, answer in pairs]
        return records

    return score
