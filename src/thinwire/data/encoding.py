"""Texts to tokens.

Prompt and answer are tokenised apart, without the tokenizer's special tokens, and joined as tokens. So the
prompt's tokens are those that generation starts from, and where the loss begins never depends on how a
tokenizer would merge across the border. The space that some tokenizers write before every text is kept out of
the border. What a chat template writes is tokenised whole, as it is where it is served, and parted where the
tokens of the prompt end, whatever the answer. The name of a special token ("</s>") in the data becomes that
token, as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thinwire.data import chat
from thinwire.data.errors import DataError
from thinwire.data.templates import AnyTemplate, Chat, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]

BATCH = 1000  # texts that go to the tokenizer at once: more of them are slower
SPACES = ("▁", "Ġ", " ")  # how a token begins that has a space in front
ANCHORS = ("\n", ".", ":", "|", "0")  # a text that follows one of them is no beginning


def encode_pairs(
    texts: Sequence[Rendered], template: AnyTemplate, tokenizer: PreTrainedTokenizerBase, ended: bool
) -> tuple[list[Tokens], list[Tokens]]:
    """The prompts' tokens and the answers', with their ends where `ended`; an answer without tokens has no end."""
    prompts = [text.prompt for text in texts]
    if isinstance(template, Chat):
        heads = _heads(prompts, tokenizer)
        wholes = encode([text.prompt + text.answer + text.end * ended for text in texts], tokenizer)
        answers = [whole[len(head) :] for whole, (head, _) in zip(wholes, heads, strict=True)]
        # where the answer would melt into the prompt, they are tokenised apart
        apart = [i for i, (head, _) in enumerate(heads) if wholes[i][: len(head)] != head]
        rests = [(texts[i].prompt + texts[i].answer + texts[i].end * ended)[heads[i][1] :] for i in apart]
        for i, tokens in zip(apart, following(rests, tokenizer), strict=True):
            answers[i] = tokens
        encoded = [head for head, _ in heads]
    else:
        encoded, answers = encode(prompts, tokenizer), following([text.answer for text in texts], tokenizer)
        if not all(prompts):  # then the answer is all of the text
            bare = [i for i, prompt in enumerate(prompts) if not prompt]
            for i, tokens in zip(bare, encode([texts[i].answer for i in bare], tokenizer), strict=True):
                answers[i] = tokens
    if ended:
        ends = closed(texts, tokenizer)
        answers = [
            tokens and (tokens if ends[text.end] else (*tokens, tokenizer.eos_token_id))
            for text, tokens in zip(texts, answers, strict=True)
        ]
    return _begun(encoded, tokenizer), answers


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """The tokens of each text, without the tokenizer's special ones."""
    if not texts:
        return []
    different = list(dict.fromkeys(texts))  # answers are often few
    # verbose=False: a text beyond the model's length is cut here, the tokenizer need not warn of it.
    first = tokenizer(different[:1], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if _is_plain(tokenizer):  # no truncation or padding is left from other calls: the first one has seen to that
        batch = tokenizer.backend_tokenizer.encode_batch_fast
        parts = (different[start : start + BATCH] for start in range(1, len(different), BATCH))
        rest = [found.ids for part in parts for found in batch(part, add_special_tokens=False)]
    elif different[1:]:
        rest = tokenizer(different[1:], add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    else:
        rest = []
    ids = {text: tuple(tokens) for text, tokens in zip(different, [*first, *rest], strict=True)}
    return [ids[text] for text in texts]


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer only hands texts on to the Rust library, whose answers it wraps slowly."""
    from transformers import PreTrainedTokenizerFast

    steps = ("__call__", "_encode_plus", "_batch_encode_plus")
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), step, None) is getattr(PreTrainedTokenizerFast, step, None) for step in steps
    )


def closed(texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """For each end of the answers whether it has a token of its own, so that no end token need follow."""
    return {end: bool(chat.stops(tokenizer, [end])[0]) for end in {text.end for text in texts}}


def _heads(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tokens, int]]:
    """The prompts' tokens as they are before an answer, and how far into the prompt they reach."""
    follows = [prompt + "a" for prompt in prompts]
    if not tokenizer.is_fast:
        pairs = zip(prompts, encode(prompts, tokenizer), encode(follows, tokenizer), strict=True)
        shared = [(prompt, alone, chat.common(alone, before)) for prompt, alone, before in pairs]
        return [(a[:n], len(text if n == len(a) else text.rstrip(" "))) for text, a, n in shared]
    found = tokenizer(follows, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # where words have the space before them in their token, a prompt ends before it
    joins = any(token.startswith(SPACES) and token.strip("".join(SPACES)) for token in tokenizer.get_vocab())
    heads = []
    for prompt, tokens, offsets in zip(prompts, found["input_ids"], found["offset_mapping"], strict=True):
        length = len(prompt.rstrip(" ") if joins else prompt)
        inside = next((i for i, (_, end) in enumerate(offsets) if end > length), len(tokens))
        heads.append((tuple(tokens[:inside]), offsets[inside - 1][1] if inside else 0))
    return heads


def following(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """The tokens of texts that another stands before: without the space that the tokenizer writes before a text."""
    first = encode(["a"], tokenizer)[0]
    if not first or not str(tokenizer.convert_ids_to_tokens([first[0]])[0]).startswith(SPACES):
        return encode(texts, tokenizer)
    found: dict[int, Tokens] = {}
    for anchor, before in zip(ANCHORS, encode(ANCHORS, tokenizer), strict=True):
        left = [i for i in range(len(texts)) if i not in found]
        for i, tokens in zip(left, encode([anchor + texts[i] for i in left], tokenizer), strict=True):
            if before and tokens[: len(before)] == before:
                found[i] = tokens[len(before) :]
    if lacking := [text for i, text in enumerate(texts) if i not in found]:
        raise DataError(f"the tokenizer writes a space before {lacking[0][:40]!r}, which stands behind a prompt")
    return [found[i] for i in range(len(texts))]


def _begun(prompts: list[Tokens], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """The prompts' tokens, each at least one, with bos in front where the tokenizer adds it by default."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    if adds:  # a chat template may have written it already
        prompts = [tokens if tokens[:1] == (bos,) else (bos, *tokens) for tokens in prompts]
    if not all(prompts):
        start = bos if bos is not None else tokenizer.eos_token_id
        if start is None:
            raise DataError("a prompt is empty, and the tokenizer has neither a bos nor an eos token to begin with")
        prompts = [tokens or (start,) for tokens in prompts]
    return prompts
