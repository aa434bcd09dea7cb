"""Greedy answers to open questions, and their Rouge-L.

The score is that of the package rouge-score, without stemming: words are runs of ASCII letters and digits, in
lower case, so that text in other scripts scores 0. FedKSeed's authors used the package `rouge`, whose words
are what lies between spaces and which weighs precision and recall otherwise: scores of the two are not
comparable to the digit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from thinwire.data.batch import Dataset, Example, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def rouge_l(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int,
    batch_size: int,
    limit: int | None = None,
) -> tuple[float, list[str]]:
    """The mean, over the first `limit` examples (None: all), of the best Rouge-L F1 of any reference; and the answers.

    An empty answer scores 0. An example without references is compared with its answer's text. ValueError: no
    example.
    """
    from rouge_score.rouge_scorer import RougeScorer

    found = generate(model, tokenizer, dataset, max_new_tokens, batch_size, limit)
    if not found:
        raise ValueError("Rouge-L needs at least one example")
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    total = 0.0
    for example, answer in zip(dataset.examples, found, strict=False):
        references = example.references or (tokenizer.decode(example.answer, skip_special_tokens=True),)
        if answer:
            total += max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
    return total / len(found), found


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int,
    batch_size: int,
    limit: int | None = None,
) -> list[str]:
    """The model's greedy answers to the first `limit` prompts, in the data set's order, stripped, cut at the end.

    Each is at most `max_new_tokens` tokens long, fewer where the model's positions end. No generator of
    random numbers is touched.
    """
    examples = dataset.examples[:limit]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))  # so that little is padded
    answers = [""] * len(examples)
    device = next(model.parameters()).device
    with _greedy(model, tokenizer, dataset.pad) as ends:
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            batch = collate([Example(examples[i].prompt, ()) for i in picked], dataset.pad)
            length = batch.input_ids.shape[1]
            positions = getattr(model.config, "max_position_embeddings", None) or length + max_new_tokens
            made = model.generate(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                max_new_tokens=max(1, min(max_new_tokens, positions - length)),
            )
            for i, tokens in zip(picked, made[:, length:].tolist(), strict=True):
                stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
                answers[i] = tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
    return answers


@contextlib.contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad: int) -> Iterator[set[int]]:
    """Plain greedy decoding without dropout inside; yields the end tokens. The model's own settings return after."""
    from transformers import GenerationConfig

    own, training = model.generation_config, model.training
    named = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = {token for token in (*named, tokenizer.eos_token_id) if token is not None}
    # In place of the model's, not beside it: fields that are not given are filled in from there (penalties,
    # temperatures).
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(ends) or None,
    )
    model.eval()
    try:
        yield ends
    finally:
        model.generation_config = own
        model.train(training)
