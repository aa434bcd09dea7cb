"""From rows to tokens.

Prompt and answer are tokenised apart, without the tokenizer's special tokens, and joined as tokens. So the
prompt's tokens are those that generation starts from, and where the loss begins never depends on how a
tokenizer would merge across the border. The space that some tokenizers write before every text is kept out of
the border. What a chat template writes is tokenised whole, as it is where it is served, and parted where the
tokens of the prompt end, whatever the answer. The name of a special token ("</s>") in the data becomes that
token, as elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thinwire.data import chat, templates
from thinwire.data.batch import Dataset, Example
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.rows import Row
from thinwire.data.templates import AnyTemplate, Chat, Rendered
from thinwire.keys import Key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]
TooLong = Literal["answer", "cut", "drop"]

BATCH = 1000  # texts that go to the tokenizer at once: more of them are slower
SPACES = ("▁", "Ġ", " ")  # how a token begins that has a space in front
ANCHORS = ("\n", ".", ":", "|", "0")  # a text that follows one of them is no beginning


def tokenise(
    rows: Sequence[Row],
    template: AnyTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    choices: Sequence[str] | None = None,
    eos: bool = True,
    too_long: TooLong = "cut",
) -> Dataset:
    """The rows as examples of at most `max_length` tokens, prompt and answer together.

    Of a row that is too long, with "cut" too long a prompt loses its beginning (but not the bos token), too long an
    answer its end; where both are too long each gets half. With "answer" the answer alone is cut, and a prompt that
    leaves no room for it is an error. With "drop" the row is left out. How many were cut or left out is counted in the
    data set. Neither prompt nor answer is ever empty. The prompt starts with bos where the tokenizer puts it
    there by default. With `eos` open answers end in what the chat template ends them with, and in the eos token where
    that is nothing or no token, unless they were cut. With `choices` the bare answer of every row must be one of them,
    and their tokens, without that end, are the candidates.

    DataError for no rows, for rows that the template refuses, an answer that is not among the choices, rows of which
    none fits (NoRowsLeft), choices that cannot be told apart, and a tokenizer without the tokens that this needs.
    """
    (found,) = tokenise_groups(
        [rows], template, tokenizer, max_length=max_length, choices=choices, eos=eos, too_long=too_long
    )
    return found


def tokenise_groups(
    groups: Sequence[Sequence[Row]],
    template: AnyTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    choices: Sequence[str] | None = None,
    eos: bool = True,
    too_long: TooLong = "cut",
) -> list[Dataset]:
    """A data set of each group of rows, as `tokenise` makes it: a hundred thousand groups cost little more than one.

    DataError as there; NoRowsLeft has the group of which no row fits as its `group`.
    """
    rows = [row for group in groups for row in group]
    if not all(groups) or not rows:
        raise DataError("there are no rows")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; prompt and answer need a token each")
    rendered = [templates.render(row, template, tokenizer) for row in rows]
    if choices is None and eos and tokenizer.eos_token_id is None and not all(_closed(rendered, tokenizer).values()):
        raise DataError("the tokenizer has no eos token to end answers with (eos = false leaves it out)")
    prompts, answers = _tokens(rendered, template, tokenizer, ended=choices is None and eos)
    pad, bos, found, start = _pad(tokenizer), tokenizer.bos_token_id, [], 0
    candidates: tuple[Tokens, ...] | None = None
    listed = tuple(choices or ())
    for i, group in enumerate(groups):
        these = slice(start, start := start + len(group))
        if choices is not None and (candidates is None or isinstance(template, Chat)):
            candidates = _candidates(choices, group[0], template, tokenizer, max_length)
        data = _Group(group, rendered[these], prompts[these], answers[these], candidates, choices)
        try:
            examples, cut = data.examples(template, bos, max_length, too_long)
        except NoRowsLeft as error:
            error.group = i
            raise
        asked, ends, notes = tuple[int, ...](), set[str](), list[str]()
        if isinstance(template, Chat):
            ends = {text.end for text in data.rendered if text.end}
            notes = [note for text in data.rendered for note in text.notes]
            talk = templates.talk_of(group[0])
            notes += chat.remarks(group[0], talk, tokenizer, ends if choices is None else ())
            asked = _encode([chat.generation_prompt(group[0], talk, tokenizer)], tokenizer)[0]
        found.append(
            Dataset(
                tuple(examples),
                pad,
                candidates,
                listed,
                cut=cut,
                dropped=len(group) - len(examples),
                ends=tuple(sorted(ends)),
                asked=asked,
                notes=tuple(dict.fromkeys(notes)),
            )
        )
    return found


@dataclass(frozen=True)
class _Group:
    """Rows of one data set, as text and as tokens."""

    rows: Sequence[Row]
    rendered: Sequence[Rendered]
    prompts: Sequence[Tokens]
    answers: Sequence[Tokens]
    candidates: tuple[Tokens, ...] | None
    choices: Sequence[str] | None

    def examples(
        self, template: AnyTemplate, bos: int | None, max_length: int, too_long: TooLong
    ) -> tuple[list[Example], int]:
        """The examples, and how many of them were cut; NoRowsLeft where there are none."""
        longest = 0 if self.candidates is None else max(len(tokens) for tokens in self.candidates)
        examples, cut = [], 0
        number = {choice: i for i, choice in enumerate(self.choices or ())}
        for row, text, prompt, own in zip(self.rows, self.rendered, self.prompts, self.answers, strict=True):
            answer, choice = own, None
            if self.candidates is not None:
                choice = _choice(row, template, number)
                answer = self.candidates[choice]
            if not answer:
                raise row.error("the answer has no tokens")
            # Every candidate has to fit behind the same prompt.
            room = longest or len(answer)
            if len(prompt) + room > max_length:
                if too_long == "drop":
                    continue
                if too_long == "answer":
                    _check_room(row, len(prompt), longest or 1, max_length)
                cut += 1
                kept = 1 if too_long == "answer" else max_length // 2
                room = longest or min(room, max(max_length - len(prompt), kept))
            examples.append(
                Example(
                    prompt=_cut_left(prompt, max_length - room, bos),
                    answer=answer[:room],
                    choice=choice,
                    references=templates.references(row, template, text.answer),
                    text=text.prompt,
                    place=f"{row.source}:{row.line}",
                )
            )
        if not examples:
            raise NoRowsLeft(f"{self.rows[0].source}: none of {len(self.rows)} rows fits into {max_length} tokens")
        return examples, cut


def _check_room(row: Row, prompt: int, answer: int, max_length: int) -> None:
    if prompt + answer > max_length:
        raise row.error(
            f"the prompt has {prompt} tokens, which leaves no room for the answer within data.max_length {max_length} "
            '(data.too_long = "cut" cuts such prompts, "drop" leaves such rows out)'
        )


def shuffle_answers(rows: Sequence[Row], key: Key, column: str | None = None) -> list[Row]:
    """The rows with their answers permuted among them: the control in which prompts say nothing of answers.

    The answer is `column`, by default what the row's shape says; `references` belong to the answer and go
    with it.
    """
    columns = [column or row.answer_column() for row in rows]
    answers = [_take(row, name) for row, name in zip(rows, columns, strict=True)]
    order = key.permutation(len(rows))
    return [_put(row, name, *answers[i]) for row, name, i in zip(rows, columns, order, strict=True)]


def _take(row: Row, column: str) -> tuple[Any, Any]:
    return templates.answer_value(row, Chat()) if templates.is_talk(row, column) else row.value(column), row.fields.get(
        "references"
    )


def _put(row: Row, column: str, value: Any, references: Any) -> Row:
    fields = {name: old for name, old in row.fields.items() if name != "references"}
    if references is not None:
        fields["references"] = references
    return templates.with_answer(Row(fields, row.source, row.line), column, value)


def _tokens(
    texts: Sequence[Rendered], template: AnyTemplate, tokenizer: PreTrainedTokenizerBase, ended: bool
) -> tuple[list[Tokens], list[Tokens]]:
    """The prompts' tokens and the answers', with their ends where `ended`; an answer without tokens has no end."""
    prompts = [text.prompt for text in texts]
    if isinstance(template, Chat):
        heads = _heads(prompts, tokenizer)
        wholes = _encode([text.prompt + text.answer + text.end * ended for text in texts], tokenizer)
        answers = [whole[len(head) :] for whole, (head, _) in zip(wholes, heads, strict=True)]
        # where the answer would melt into the prompt, they are tokenised apart
        apart = [i for i, (head, _) in enumerate(heads) if wholes[i][: len(head)] != head]
        rests = [(texts[i].prompt + texts[i].answer + texts[i].end * ended)[heads[i][1] :] for i in apart]
        for i, tokens in zip(apart, _following(rests, tokenizer), strict=True):
            answers[i] = tokens
        encoded = [head for head, _ in heads]
    else:
        encoded, answers = _encode(prompts, tokenizer), _following([text.answer for text in texts], tokenizer)
        if not all(prompts):  # then the answer is all of the text
            bare = [i for i, prompt in enumerate(prompts) if not prompt]
            for i, tokens in zip(bare, _encode([texts[i].answer for i in bare], tokenizer), strict=True):
                answers[i] = tokens
    if ended:
        closed = _closed(texts, tokenizer)
        answers = [
            tokens and (tokens if closed[text.end] else (*tokens, tokenizer.eos_token_id))
            for text, tokens in zip(texts, answers, strict=True)
        ]
    return _begun(encoded, tokenizer), answers


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    if not texts:
        return []
    different = list(dict.fromkeys(texts))  # answers are often few
    # verbose=False: a text beyond the model's length is cut here, the tokenizer need not warn of it.
    first = tokenizer(different[:1], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if _is_plain(tokenizer):  # no truncation or padding is left from other calls: the first one has seen to that
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        parts = (different[start : start + BATCH] for start in range(1, len(different), BATCH))
        rest = [found.ids for part in parts for found in encode(part, add_special_tokens=False)]
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


def _closed(texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """For each end of the answers whether it has a token of its own, so that no end token need follow."""
    return {end: bool(chat.stops(tokenizer, [end])[0]) for end in {text.end for text in texts}}


def _heads(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tokens, int]]:
    """The prompts' tokens as they are before an answer, and how far into the prompt they reach."""
    follows = [prompt + "a" for prompt in prompts]
    if not tokenizer.is_fast:
        pairs = zip(prompts, _encode(prompts, tokenizer), _encode(follows, tokenizer), strict=True)
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


def _following(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """The tokens of texts that another stands before: without the space that the tokenizer writes before a text."""
    first = _encode(["a"], tokenizer)[0]
    if not first or not str(tokenizer.convert_ids_to_tokens([first[0]])[0]).startswith(SPACES):
        return _encode(texts, tokenizer)
    found: dict[int, Tokens] = {}
    for anchor, before in zip(ANCHORS, _encode(ANCHORS, tokenizer), strict=True):
        left = [i for i in range(len(texts)) if i not in found]
        for i, tokens in zip(left, _encode([anchor + texts[i] for i in left], tokenizer), strict=True):
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


def _cut_left(prompt: Tokens, room: int, bos: int | None) -> Tokens:
    """The last `room` tokens of the prompt; a bos at its beginning stays there."""
    if len(prompt) <= room:
        return prompt
    if prompt[0] == bos and room > 1:
        return (prompt[0], *prompt[1 - room :])
    return prompt[-room:]


def _candidates(
    choices: Sequence[str], row: Row, template: AnyTemplate, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Tokens, ...]:
    """The tokens of each choice, behind the row's prompt; DataError for two alike, one empty, one too long."""
    if len(choices) < 2:
        raise DataError("choices lists fewer than two answers")
    for choice in choices:
        if not choice.strip():
            raise DataError(f"the choice {choice!r} is empty")
    if isinstance(template, Chat):
        rows = [templates.with_answer(row, row.answer_column(), choice) for choice in choices]
        texts = [templates.render(row, template, tokenizer) for row in rows]
        encoded = _tokens(texts, template, tokenizer, ended=False)[1]
    else:
        encoded = _following([templates.answer_text(template, choice) for choice in choices], tokenizer)
    seen: dict[Tokens, str] = {}
    for choice, tokens in zip(choices, encoded, strict=True):
        if not tokens:
            raise DataError(f"the choice {choice!r} is empty")
        if len(tokens) >= max_length:
            raise DataError(f"the choice {choice!r} has {len(tokens)} tokens; max_length {max_length} leaves no prompt")
        if tokens in seen:
            raise DataError(f"the choices {seen[tokens]!r} and {choice!r} have the same tokens")
        seen[tokens] = choice
    return tuple(encoded)


def _choice(row: Row, template: AnyTemplate, choices: Mapping[str, int]) -> int:
    """The number of the row's answer among the choices; DataError where it is none of them."""
    value = templates.answer_value(row, template)
    if value not in choices:
        shown = value if len(value) <= 40 else value[:40] + "..."
        raise row.error(f"the answer {shown!r} is not one of the choices: {', '.join(choices)}")
    return choices[value]


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a batch; it is masked everywhere, so any token does."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
