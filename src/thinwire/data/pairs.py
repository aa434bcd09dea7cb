"""Rows for embeddings: an anchor, a positive that belongs to it, and maybe a negative that does not.

    {"anchor": ..., "positive": ...}
    {"anchor": ..., "positive": ..., "negative": ...}

each a text, as in the data sets of sentence-transformers. A template of the user's own reads any columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thinwire.data import templates
from thinwire.data.batch import Dataset, Example
from thinwire.data.encoding import Tokens
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.rows import Row
from thinwire.data.templates import AnyTemplate, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = ("anchor", "positive", "negative")
PAIR, NEGATIVE = Template("{anchor}", "{positive}"), Template("{anchor}", "{negative}")
"""What is read where the run sets nothing else; the second as its answer, where rows have a negative."""


def pairs(
    groups: Sequence[Sequence[Row]],
    template: AnyTemplate,
    negative: AnyTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    drop: bool = False,
) -> list[Dataset]:
    """A data set of each group of rows: texts of at most `max_length` tokens, the tokenizer's special ones included.

    `negative`: the template whose answer is the negative, None: rows have none. Too long a text loses its end, or with
    `drop` its row is left out; the data sets count both. DataError for no rows, and for rows that the templates refuse
    or whose anchor is empty; NoRowsLeft has the group of which no row fits as its `group`.
    """
    found = []
    for i, rows in enumerate(groups):
        if not rows:
            raise DataError("there are no rows")
        examples, cut = [], 0
        for row in rows:
            text = templates.render(row, template, tokenizer)
            if not text.prompt.strip():
                raise row.error("the anchor is empty: there is no text to embed")
            texts = [text.prompt, text.answer]
            texts += [] if negative is None else [templates.render(row, negative, tokenizer).answer]
            tokens = [_tokens(each, tokenizer, None) for each in texts]
            if any(len(each) > max_length for each in tokens):
                if drop:
                    continue
                cut += 1
                tokens = [_tokens(each, tokenizer, max_length) for each in texts]
            if not all(tokens):
                raise row.error("a text has no tokens")
            anchor, positive, *other = tokens
            examples.append(
                Example(
                    anchor,
                    positive,
                    references=(text.answer.strip(),),
                    text=text.prompt,
                    place=f"{row.source}:{row.line}",
                    rejected=other[0] if other else (),
                    apart=True,
                )
            )
        if not examples:
            error = NoRowsLeft(f"{rows[0].source}: none of {len(rows)} rows fits into {max_length} tokens")
            error.group = i
            raise error
        found.append(Dataset(tuple(examples), tokenizer.pad_token_id or 0, cut=cut, dropped=len(rows) - len(examples)))
    return found


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, most: int | None) -> Tokens:
    cut = {} if most is None else {"truncation": True, "max_length": most}
    return tuple(tokenizer(text, verbose=False, **cut)["input_ids"])
