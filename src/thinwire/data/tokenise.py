"""From rows to tokens.

Prompt and answer are tokenised apart, without the tokenizer's special tokens, and joined as tokens. So the
prompt's tokens are those that generation starts from, and where the loss begins never depends on how a
tokenizer would merge across the border. A tokenizer that writes a space before every text writes one before
the answer too. The name of a special token ("</s>") in the data becomes that token, as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from thinwire.data import templates
from thinwire.data.batch import Dataset, Example
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.load import Row
from thinwire.data.templates import AnyTemplate
from thinwire.keys import Key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]
TooLong = Literal["answer", "cut", "drop"]


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
    there by default. Open answers end in the eos token with `eos`, unless they were cut. With `choices` the
    bare answer of every row must be one of them, and their tokens, without eos, are the candidates.

    DataError for no rows, for rows that the template refuses, an answer that is not among the choices, rows of which
    none fits (NoRowsLeft), choices that cannot be told apart, and a tokenizer without the tokens that this needs.
    """
    if not rows:
        raise DataError("there are no rows")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; prompt and answer need a token each")
    if choices is None and eos and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos token to end answers with (eos = false leaves it out)")
    rendered = [templates.render(row, template, tokenizer) for row in rows]
    prompts = _prompts([text.prompt for text in rendered], tokenizer)
    if choices is None:
        candidates = None
        picked: list[int | None] = [None] * len(rows)
        end = (tokenizer.eos_token_id,) if eos else ()
        answers = [tokens and tokens + end for tokens in _encode([text.answer for text in rendered], tokenizer)]
    else:
        candidates = _candidates(choices, template, tokenizer, max_length)
        indices = [_choice(row, template, choices) for row in rows]
        picked, answers = list(indices), [candidates[i] for i in indices]
    longest = 0 if candidates is None else max(len(tokens) for tokens in candidates)
    examples, cut = [], 0
    for row, text, prompt, answer, choice in zip(rows, rendered, prompts, answers, picked, strict=True):
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
                prompt=_cut_left(prompt, max_length - room, tokenizer.bos_token_id),
                answer=answer[:room],
                choice=choice,
                references=templates.references(row, template, text.answer),
                text=text.prompt,
                place=f"{row.source}:{row.line}",
            )
        )
    if not examples:
        raise NoRowsLeft(f"{rows[0].source}: none of {len(rows)} rows fits into {max_length} tokens")
    dropped = len(rows) - len(examples)
    return Dataset(tuple(examples), _pad(tokenizer), candidates, tuple(choices or ()), cut=cut, dropped=dropped)


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
    value = templates.messages_of(row)[-1]["content"] if column == "messages" else row.value(column)
    return value, row.fields.get("references")


def _put(row: Row, column: str, value: Any, references: Any) -> Row:
    fields = {name: old for name, old in row.fields.items() if name != "references"}
    if column == "messages":
        fields[column] = [*fields[column][:-1], {**fields[column][-1], "content": value}]
    else:
        fields[column] = value
    if references is not None:
        fields["references"] = references
    return Row(fields, row.source, row.line)


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    # verbose=False: a text beyond the model's length is cut here, the tokenizer need not warn of it.
    ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [tuple(tokens) for tokens in ids]


def _prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """The prompts' tokens, each at least one, with bos in front where the tokenizer adds it by default."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    prompts = _encode(texts, tokenizer)
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
    choices: Sequence[str], template: AnyTemplate, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Tokens, ...]:
    """The tokens of each choice; DataError where two are alike, or one is empty or too long."""
    if len(choices) < 2:
        raise DataError("choices lists fewer than two answers")
    encoded = _encode([templates.answer_text(template, choice) for choice in choices], tokenizer)
    seen: dict[Tokens, str] = {}
    for choice, tokens in zip(choices, encoded, strict=True):
        if not tokens or not choice.strip():
            raise DataError(f"the choice {choice!r} is empty")
        if len(tokens) >= max_length:
            raise DataError(f"the choice {choice!r} has {len(tokens)} tokens; max_length {max_length} leaves no prompt")
        if tokens in seen:
            raise DataError(f"the choices {seen[tokens]!r} and {choice!r} have the same tokens")
        seen[tokens] = choice
    return tuple(encoded)


def _choice(row: Row, template: AnyTemplate, choices: Sequence[str]) -> int:
    value = templates.answer_value(row, template)
    if value not in choices:
        shown = value if len(value) <= 40 else value[:40] + "..."
        raise row.error(f"the answer {shown!r} is not one of the choices: {', '.join(choices)}")
    return list(choices).index(value)


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a batch; it is masked everywhere, so any token does."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
