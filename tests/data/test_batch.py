"""Batches: where every token, position and label stands."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHOICES, PAD, tiny_model, tiny_rows, tiny_tokenizer

from thinwire.data.batch import IGNORE, Batch, Dataset, Example, collate, collate_packed
from thinwire.data.templates import NAMED, Template
from thinwire.data.tokenise import tokenise
from thinwire.keys import Key

A, B = Example((1, 2, 3), (4, 5), choice=0), Example((6,), (7,), choice=1)


def test_open_answers_end_at_the_last_position() -> None:
    batch = collate([A, B], pad=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [9, 9, 9, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert batch.labels.tolist() == [[4, 5], [IGNORE, 7]]
    assert (batch.examples, batch.candidates, batch.choice, batch.candidate_ids) == (2, 1, None, None)
    assert batch.kind == batch.repeated(2).kind == "open"
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.position_ids, batch.labels)} == {torch.int64}


def test_packed_examples_stand_one_after_the_other() -> None:
    c = Example((8,), (7, 6, 5))
    batch = collate_packed([[A, B], [c]], pad=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [9, 9, 9, 8, 7, 6, 5]]
    assert batch.attention_mask.tolist() == [[1] * 7, [0, 0, 0, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert batch.labels.tolist() == [[4, 5, IGNORE, 7], [IGNORE, 7, 6, 5]]
    assert (batch.examples, batch.kind, batch.repeated(2).kind) == (3, "packed", "packed")


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=30), st.integers(1, 4))
def test_a_packed_pass_holds_every_example_once(lengths: list[tuple[int, int]], size: int) -> None:
    # the first token of an example is its number, and no other token is above 99
    examples = tuple(
        Example((100 + i,) + (1,) * (prompt - 1), (2,) * answer) for i, (prompt, answer) in enumerate(lengths)
    )
    batches = Dataset(examples, pad=0, pack=16).batches(Key.root(1), size)
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(examples):
            batch = next(batches)
            starts = batch.input_ids >= 100
            assert batch.input_ids.shape[0] <= size
            assert batch.input_ids.shape[1] <= 16
            assert int(starts.sum()) == batch.examples
            assert (batch.position_ids[starts] == 0).all()
            seen += (batch.input_ids[starts] - 100).tolist()
        assert sorted(seen) == list(range(len(examples)))


def test_packed_rows_are_filled() -> None:
    examples = tuple(Example((1,) * 3, (2,)) for _ in range(40))
    first = next(Dataset(examples, pack=16).batches(Key.root(0), 5))
    assert (tuple(first.input_ids.shape), first.examples, int(first.attention_mask.sum())) == ((5, 16), 20, 80)


def test_candidates_of_several_tokens_take_a_row_each() -> None:
    batch = collate([A, B], pad=0, candidates=[(7,), (8, 9)])
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 7], [1, 2, 3, 8, 9], [0, 0, 0, 6, 7], [0, 0, 6, 8, 9]]
    assert batch.labels.tolist() == [[IGNORE, 7], [8, 9]] * 2
    assert batch.choice is not None
    assert batch.choice.tolist() == [0, 1]
    assert (batch.kind, batch.examples, batch.candidates, batch.candidate_ids) == ("choice", 2, 2, None)


def test_candidates_of_one_token_take_no_row() -> None:
    batch = collate([A, B], pad=0, candidates=[(7,), (8,)])
    assert batch.input_ids.tolist() == [[1, 2, 3], [0, 0, 6]]
    assert batch.labels.shape == (2, 0)
    assert batch.candidate_ids is not None
    assert batch.candidate_ids.tolist() == [7, 8]
    assert (batch.kind, batch.examples, batch.candidates) == ("token", 2, 2)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=1)),
        min_size=1,
        max_size=5,
    )
)
def test_labels_are_the_tokens_in_the_last_positions(pairs: list[tuple[list[int], list[int]]]) -> None:
    batch = collate([Example(tuple(p), tuple(a)) for p, a in pairs], pad=0)
    tail = batch.input_ids[:, -batch.labels.shape[1] :]
    counted = batch.labels != IGNORE
    assert torch.equal(tail[counted], batch.labels[counted])
    assert counted.sum(1).tolist() == [len(a) for _, a in pairs]
    assert batch.attention_mask.sum(1).tolist() == [len(p) + len(a) for p, a in pairs]
    assert (batch.input_ids[batch.attention_mask == 0] == 0).all()


def loss(batch: Batch) -> torch.Tensor:
    """The summed loss of each row, in float64."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        logits = tiny_model()(**inputs, position_ids=batch.position_ids).logits.double()
    width = batch.labels.shape[1]
    scores = logits[:, -width - 1 : -1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(scores, batch.labels, ignore_index=IGNORE, reduction="none").sum(1)


def test_padding_changes_no_loss() -> None:
    data = tokenise(tiny_rows(4), NAMED["plain"], tiny_tokenizer(), max_length=64)
    together = loss(collate(data.examples, PAD))
    alone = torch.cat([loss(collate([example], PAD)) for example in data.examples])
    assert torch.allclose(together, alone, rtol=1e-5)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32))
def test_a_pass_holds_every_example_once(count: int, size: int, seed: int) -> None:
    data = Dataset(tuple(Example((i,), (0,)) for i in range(count)))
    batches = -(-count // size)
    taken = list(itertools.islice(data.batches(Key.root(seed), size), 3 * batches))
    for turn in range(3):
        seen = Counter(
            token for b in taken[turn * batches : (turn + 1) * batches] for token in b.input_ids[:, 0].tolist()
        )
        assert seen == Counter(range(count))
    again = itertools.islice(data.batches(Key.root(seed), size), 3 * batches)
    assert all(torch.equal(x.input_ids, y.input_ids) for x, y in zip(taken, again, strict=True))


def test_orders_differ_between_passes_and_keys_and_leave_the_global_generators_alone() -> None:
    data = Dataset(tuple(Example((i,), (0,)) for i in range(50)))
    state = torch.random.get_rng_state()
    orders = [
        tuple(batch.input_ids[:, 0].tolist())
        for seed in (0, 1)
        for batch in itertools.islice(data.batches(Key.root(seed), 50), 2)
    ]
    assert len({*orders, tuple(range(50))}) == 5
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("choices", [None, CHOICES])
def test_in_order_gives_every_example_once_shortest_first(choices: tuple[str, ...] | None) -> None:
    template = Template("{input} It was", " {output}")
    data = tokenise(tiny_rows(7, closed=True), template, tiny_tokenizer(), max_length=64, choices=choices)
    pairs = list(data.in_order(3))
    examples = [example for _, picked in pairs for example in picked]
    assert sorted(map(id, examples)) == sorted(map(id, data.examples))
    lengths = [len(e.prompt) + len(e.answer) for e in examples]
    assert lengths == sorted(lengths)
    assert [batch.examples for batch, _ in pairs] == [3, 3, 1]
    assert all(batch.candidates == (2 if choices else 1) for batch, _ in pairs)


def test_balanced_batches_hold_the_answers_in_equal_numbers() -> None:
    """However skewed the rows: each pass goes once over the more frequent answer, and round the rarer one."""
    examples = tuple(Example((i,), (), choice=int(i < 5)) for i in range(40))
    data = Dataset(examples, 0, candidates=((1,), (2,)), balanced=True)
    batches = list(itertools.islice(data.batches(Key.root(0), 8), 9))
    assert all(int(batch.choice.sum()) * 2 == batch.examples for batch in batches)
    seen = torch.cat([batch.input_ids[batch.choice == 0].flatten() for batch in batches])
    assert sorted(seen.tolist()) == list(range(5, 40))
