"""From rows to tokens: the examples of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thinwire.data import chat, templates
from thinwire.data.batch import Dataset, Example
from thinwire.data.encoding import Tokens, closed, encode, encode_pairs, following
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.rows import Row
from thinwire.data.templates import AnyTemplate, Chat, Rendered
from thinwire.keys import Key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    there by default. With `eos` open answers end in what the chat template ends them with, and in the eos token where
    that is nothing or no token, unless they were cut. With `choices` the bare answer of every row must be one of them,
    and their tokens, without that end, are the candidates.

    DataError for no rows, for rows that the template refuses, an answer that is not among the choices, rows of which
    none fits (NoRowsLeft), choices that cannot be kept apart, and a tokenizer without the tokens that this needs.
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
    rejected: tuple[Sequence[Sequence[Row]], AnyTemplate] | None = None,
) -> list[Dataset]:
    """A data set of each group of rows, as `tokenise` makes it: a hundred thousand groups cost little more than one.

    `rejected`: the same rows, and a template, that make the answers which the others were preferred to; both have to
    fit behind one prompt. DataError as there; NoRowsLeft has the group of which no row fits as its `group`.
    """
    rows = [row for group in groups for row in group]
    if not all(groups) or not rows:
        raise DataError("there are no rows")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; prompt and answer need a token each")
    rendered = [templates.render(row, template, tokenizer) for row in rows]
    if choices is None and eos and tokenizer.eos_token_id is None and not all(closed(rendered, tokenizer).values()):
        raise DataError("the tokenizer has no eos token to end answers with (eos = false leaves it out)")
    prompts, answers = encode_pairs(rendered, template, tokenizer, ended=choices is None and eos)
    others, worse = _rejected(rendered, *rejected, tokenizer, eos) if rejected is not None else (rendered, None)
    pad, bos, found, start = _pad(tokenizer), tokenizer.bos_token_id, [], 0
    candidates: tuple[Tokens, ...] | None = None
    listed = tuple(choices or ())
    for i, group in enumerate(groups):
        these = slice(start, start := start + len(group))
        if choices is not None and (candidates is None or isinstance(template, Chat)):
            candidates = _candidates(choices, group[0], template, tokenizer, max_length)
        less = None if worse is None else worse[these]
        data = _Group(group, rendered[these], prompts[these], answers[these], candidates, choices, less)
        try:
            examples, cut = data.examples(template, bos, max_length, too_long)
        except NoRowsLeft as error:
            error.group = i
            raise
        asked, ends, notes = tuple[int, ...](), set[str](), list[str]()
        if isinstance(template, Chat):
            texts = data.rendered if rejected is None else [*data.rendered, *others[these]]
            ends = {text.end for text in texts if text.end}
            notes = [note for text in texts for note in text.notes]
            talk = templates.talk_of(group[0])
            notes += chat.remarks(group[0], talk, tokenizer, ends if choices is None else ())
            asked = encode([chat.generation_prompt(group[0], talk, tokenizer)], tokenizer)[0]
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


def _rejected(
    chosen: Sequence[Rendered],
    groups: Sequence[Sequence[Row]],
    template: AnyTemplate,
    tokenizer: PreTrainedTokenizerBase,
    eos: bool,
) -> tuple[list[Rendered], list[Tokens]]:
    """The rejected answers as text and as tokens; DataError where one stands behind another prompt than the chosen."""
    rows = [row for group in groups for row in group]
    rendered = [templates.render(row, template, tokenizer) for row in rows]
    for row, one, other in zip(rows, chosen, rendered, strict=True):
        if one.prompt != other.prompt:
            raise row.error("the chosen and the rejected answer do not follow the same messages")
    return rendered, encode_pairs(rendered, template, tokenizer, ended=eos)[1]


@dataclass(frozen=True)
class _Group:
    """Rows of one data set, as text and as tokens."""

    rows: Sequence[Row]
    rendered: Sequence[Rendered]
    prompts: Sequence[Tokens]
    answers: Sequence[Tokens]
    candidates: tuple[Tokens, ...] | None
    choices: Sequence[str] | None
    rejected: Sequence[Tokens] | None

    def examples(
        self, template: AnyTemplate, bos: int | None, max_length: int, too_long: TooLong
    ) -> tuple[list[Example], int]:
        """The examples, and how many of them were cut; NoRowsLeft where there are none."""
        longest = 0 if self.candidates is None else max(len(tokens) for tokens in self.candidates)
        examples, cut = [], 0
        number = {choice: i for i, choice in enumerate(self.choices or ())}
        others = self.rejected if self.rejected is not None else [()] * len(self.rows)
        parts = zip(self.rows, self.rendered, self.prompts, self.answers, others, strict=True)
        for row, text, prompt, own, other in parts:
            answer, choice = own, None
            if self.candidates is not None:
                choice = _choice(row, template, number)
                answer = self.candidates[choice]
            if not answer or (self.rejected is not None and not other):
                raise row.error("the answer has no tokens")
            # Every candidate has to fit behind the same prompt.
            room = longest or max(len(answer), len(other))
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
                    rejected=other[:room],
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
    """The rows with their answers permuted among them: the control in which prompts have nothing to do with answers.

    The answer is `column`, by default the one of the row's shape; `references` belong to the answer and go
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
        encoded = encode_pairs(texts, template, tokenizer, ended=False)[1]
    else:
        encoded = following([templates.answer_text(template, choice) for choice in choices], tokenizer)
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
