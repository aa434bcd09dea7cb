"""Rows for embeddings as examples of texts that are read apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer

from thinwire.data.batch import Batch, Dataset, collate
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.pairs import NEGATIVE, PAIR, pairs
from thinwire.data.rows import Row
from thinwire.data.templates import AnyTemplate, Jinja, Template
from thinwire.keys import Key


def row(line: int = 1, **fields: Any) -> Row:
    return Row(fields, "pairs.jsonl", line)


def made(rows: list[Row], template: AnyTemplate = PAIR, negative: AnyTemplate | None = None, **options: Any) -> Dataset:
    (found,) = pairs([rows], template, negative, tiny_tokenizer(), **({"max_length": 20} | options))
    return found


def text(tokens: tuple[int, ...]) -> str:
    return bytes(tokens).decode()


def texts(batch: Batch) -> list[str]:
    rows = zip(batch.input_ids, batch.attention_mask, strict=True)
    return [text(tuple(ids[mask.bool()].tolist())) for ids, mask in rows]


ROWS = [row(1, anchor="a", positive="bb", negative="ccc"), row(2, anchor="four", positive="five5", negative="6")]


def test_an_example_is_three_texts() -> None:
    found = made(ROWS, negative=NEGATIVE)
    assert [(text(e.prompt), text(e.answer), text(e.rejected)) for e in found.examples] == [
        ("a", "bb", "ccc"),
        ("four", "five5", "6"),
    ]
    assert [len(e) for e in found.examples] == [3, 5]  # the longest, since each is a row of its own
    assert found.examples[1].place == "pairs.jsonl:2"
    assert (found.examples[0].text, found.examples[0].references) == ("a", ("bb",))
    assert [e.rejected for e in made(ROWS).examples] == [(), ()]


def test_a_batch_has_a_row_a_text_padded_on_the_right() -> None:
    examples = made(ROWS, negative=NEGATIVE).examples
    batch = collate(examples, 258, scale=7.0)
    assert (batch.kind, batch.examples, batch.candidates, batch.scale) == ("pair", 2, 3, 7.0)
    assert texts(batch) == ["a", "bb", "ccc", "four", "five5", "6"]
    assert batch.attention_mask[:, 0].all()
    assert batch.labels.shape == (6, 0)
    twice = batch.repeated(2)
    assert (twice.examples, twice.candidates) == (4, 3)
    assert torch.equal(twice.input_ids[6:], batch.input_ids)


def test_batches_take_each_pair_once_a_pass() -> None:
    data = replace(made([row(i, anchor="a" * i, positive="b" * (i + 1)) for i in range(1, 8)]), scale=20.0)
    batches = data.batches(Key.root(3), 3)
    seen = [anchor for _ in range(3) for anchor in texts(next(batches))[::2]]
    assert sorted(seen) == ["a" * i for i in range(1, 8)]


@pytest.mark.parametrize("drop", [False, True])
def test_texts_that_are_too_long(drop: bool) -> None:
    rows = [row(1, anchor="a", positive="b"), row(2, anchor="c", positive="d" * 30)]
    found = made(rows, drop=drop)
    assert (found.cut, found.dropped) == ((0, 1) if drop else (1, 0))
    assert [len(e) for e in found.examples] == ([1] if drop else [1, 20])
    if drop:
        with pytest.raises(NoRowsLeft, match="none of 1 rows fits into 20 tokens") as refused:
            pairs([rows[:1], rows[1:]], PAIR, None, tiny_tokenizer(), max_length=20, drop=True)
        assert refused.value.group == 1


def test_templates_of_ones_own() -> None:
    held = [row(1, q="who?", d="me", n="you")]
    plain = made(held, Template("query: {q}", "{d}"), Template("query: {q}", "{n}"))
    jinja = made(held, Jinja("query: {{ q }}", "{{ d }}"), Jinja("query: {{ q }}", "{{ n }}"))
    assert plain.examples == jinja.examples
    assert text(plain.examples[0].prompt) == "query: who?"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"anchor": "a"}, r"field 'positive' is missing \(present: anchor\)"),
        ({"positive": "a", "negative": "b"}, r"field 'anchor' is missing \(present: positive, negative\)"),
        ({"anchor": "a", "positive": "b"}, r"field 'negative' is missing \(present: anchor, positive\)"),
        ({"anchor": "a", "positive": None, "negative": "c"}, "field 'positive' is null"),
        ({"anchor": "a", "positive": " ", "negative": "c"}, "field 'positive' is empty"),
        ({"anchor": " ", "positive": "b", "negative": "c"}, "the anchor is empty: there is no text to embed"),
        ({"anchor": "a", "positive": ["b"], "negative": "c"}, "field 'positive' is a list, not text"),
    ],
)
def test_rows_that_lack_a_text_are_named(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=rf"^pairs\.jsonl:7: {complaint}[^\n]*$"):
        made([ROWS[0], row(7, **fields)], negative=NEGATIVE)


def test_no_rows() -> None:
    with pytest.raises(DataError, match="there are no rows"):
        made([])
