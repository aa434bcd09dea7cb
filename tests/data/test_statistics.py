"""What is reported of a data set, against counts made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from thinwire.data.batch import Dataset, Example
from thinwire.data.rows import Row
from thinwire.data.statistics import Lengths, describe, filled, shortened, skew
from thinwire.data.templates import Template
from thinwire.data.tokenise import tokenise

COUNTS = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9)).filter(lambda counts: sum(counts.values()) > 0),
    min_size=1,
    max_size=6,
)


def data(*lengths: int, **counts: int) -> Dataset:
    return Dataset(tuple(Example((1,) * (n - 2), (2, 3)) for n in lengths), **counts)


def test_a_description() -> None:
    found = describe("north", data(3, 5, 10, 4, cut=1, dropped=2), ["b", "a", "b", "c", "b", "a"])
    assert (found.name, found.rows, found.cut, found.dropped) == ("north", 6, 1, 2)
    assert found.tokens == Lengths(4.5, pytest.approx(9.25), 10, 2.0)
    assert list(found.labels.items()) == [("b", 3), ("a", 2), ("c", 1)]


def test_skew_of_known_partitions() -> None:
    assert skew([{"a": 2, "b": 2}, {"a": 5, "b": 5}]) == 0
    assert skew([{"a": 3}, {"b": 3}]) == pytest.approx(1)
    assert skew([{"a": 3}, {"a": 1}]) == 0
    # whole 3/4, 1/4; distances 1/4 (4 rows), 1/4 (4 rows); the most 1 - 9/16 - 1/16
    assert skew([{"a": 4}, {"a": 2, "b": 2}]) == pytest.approx(0.25 / 0.375)


@given(COUNTS)
def test_skew_is_a_share(counts: list[dict[str, int]]) -> None:
    assert -1e-9 <= skew(counts) <= 1 + 1e-9
    assert skew(counts) == pytest.approx(skew(counts * 3))


def test_the_line_on_rows_that_were_shortened() -> None:
    assert shortened(["a"], [data(3)], 8) is None
    clients = [data(3, 4, cut=1), data(5), data(3, cut=1, dropped=3)]
    line = "2 of 7 rows cut to 8 tokens (a 1, c 1); 3 of 7 rows left out as longer (c 3)"
    assert shortened(["a", "b", "c"], clients, 8) == line
    many = [data(3, cut=1) for _ in range(7)]
    assert shortened([*"abcdefg"], many, 8) == "7 of 7 rows cut to 8 tokens (a 1, b 1, c 1, d 1, e 1, 2 clients more)"


def test_a_row_that_is_cut_is_counted_where_it_is() -> None:
    rows = [Row({"p": "x" * n, "a": "y"}, "rows.csv", n) for n in (3, 30)]
    found = tokenise(rows, Template("{p}", "{a}"), tiny_tokenizer(), max_length=10, too_long="cut")
    assert shortened(["a"], [found], 10) == "1 of 2 rows cut to 10 tokens (a 1)"


def test_how_full_packed_rows_are() -> None:
    assert filled(data(4, 4, 4, 4, pack=8)) == (2, 1.0)
    assert filled(data(5, 5, 5, pack=8)) == (3, pytest.approx(15 / 24))
