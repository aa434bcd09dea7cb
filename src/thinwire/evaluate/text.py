"""Greedy answers to open questions, their Rouge-L, their BLEU, and how many are right to the letter.

Rouge-L is that of the package rouge-score, without stemming: words are runs of ASCII letters and digits, in
lower case, so that text in other scripts scores 0. FedKSeed's authors used the package `rouge`, whose words
are what lies between spaces and which weighs precision and recall otherwise: scores of the two are not
comparable to the digit. BLEU is sacrebleu's, of the whole set at once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch

from thinwire.data.batch import Dataset, Example, collate
from thinwire.data.chat import stops
from thinwire.model.trial import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def references(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """What each example accepts as an answer: its references, or without any the text of its answer."""
    return [example.references or (text_of(tokenizer, example.answer),) for example in examples]


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Tokens as text, without those that stand for none."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def rouge_l(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """The mean over answers of the best Rouge-L F1 against any that is accepted, 0 to 1; an empty answer scores 0.

    ValueError: no answer.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if not answers:
        raise ValueError("Rouge-L needs at least one answer")
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    best = (
        max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in several) if answer else 0.0
        for answer, several in zip(answers, accepted, strict=True)
    )
    return float(sum(best) / len(answers))


def exact_match(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """The share of answers that are one of those accepted, but for space around and between words. ValueError: none."""
    if not answers:
        raise ValueError("exact match needs at least one answer")
    right = (
        " ".join(answer.split()) in {" ".join(reference.split()) for reference in several}
        for answer, several in zip(answers, accepted, strict=True)
    )
    return sum(right) / len(answers)


def bleu(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """BLEU of all answers together, 0 to 100, with sacrebleu's tokens and smoothing. ValueError: no answer."""
    from sacrebleu.metrics.bleu import BLEU

    if not answers:
        raise ValueError("BLEU needs at least one answer")
    most = max(map(len, accepted))
    streams = [[several[i] if i < len(several) else None for several in accepted] for i in range(most)]
    # its annotation forgets the None of an answer with fewer references
    return float(BLEU().corpus_score(answers, cast(list[list[str]], streams)).score)


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

    It ends where the data set's answers do, or at an end token of the model's or the tokenizer's. Each is at most
    `max_new_tokens` tokens long, fewer where the model's positions end. No generator of random numbers is touched.
    """
    examples = dataset.examples[:limit]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))  # so that little is padded
    answers = [""] * len(examples)
    device = next(model.parameters()).device
    with decoding(model, tokenizer, dataset) as (ends, texts):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            batch = collate([Example(examples[i].prompt, ()) for i in picked], dataset.pad)
            length = batch.input_ids.shape[1]
            room = positions(model) or length + max_new_tokens
            made = cast(Callable[..., torch.Tensor], model.generate)(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                max_new_tokens=max(1, min(max_new_tokens, room - length)),
            )
            for i, tokens in zip(picked, made[:, length:].tolist(), strict=True):
                answers[i] = answer_of(tokenizer, tokens, ends, texts)
    return answers


def answer_of(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], ends: Collection[int], texts: Sequence[str]
) -> str:
    """What was generated as text, stripped, up to the first of the end tokens and of the texts that end an answer."""
    stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    text = text_of(tokenizer, tokens[:stop])
    for end in texts:
        text = text.partition(end)[0]
        if stop == len(tokens):  # there was no room for all of the end
            begun = next((n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n])), 0)
            text = text[: len(text) - begun]
    return text.strip()


@contextlib.contextmanager
def decoding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, temperature: float = 0.0
) -> Iterator[tuple[set[int], tuple[str, ...]]]:
    """Plain greedy decoding without dropout inside; yields the tokens and the texts at which an answer is over.

    With a temperature it draws, as the model's own settings have it. Those return after.
    """
    from transformers import GenerationConfig

    own, training = model.generation_config, model.training
    named = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    closing, texts = stops(tokenizer, dataset.ends)
    ends = {token for token in (*named, tokenizer.eos_token_id, *closing) if token is not None}
    # In place of the model's, not beside it: fields that are not given are filled in from there (penalties,
    # temperatures).
    settings = GenerationConfig.from_dict({"do_sample": False, "bos_token_id": own.bos_token_id})
    if temperature > 0:
        settings = copy.deepcopy(own)
        settings.do_sample, settings.temperature = True, temperature
    settings.use_cache, settings.pad_token_id, settings.eos_token_id = True, dataset.pad, sorted(ends) or None
    model.generation_config = settings
    model.train(False)
    try:
        yield ends, texts
    finally:
        model.generation_config = own
        model.train(training)
