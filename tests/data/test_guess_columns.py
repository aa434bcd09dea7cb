"""What is proposed for columns as people have them, and that it can always be used."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from thinwire.data.errors import DataError
from thinwire.data.guess_columns import Proposal, propose
from thinwire.data.rows import Row
from thinwire.data.templates import Template
from thinwire.data.tokenise import tokenise


def rows(count: int = 40, **columns: Any) -> list[Row]:
    """Rows whose columns are made by functions of their number."""
    return [Row({name: make(i) for name, make in columns.items()}, "rows.csv", i + 2) for i in range(count)]


def text(i: int) -> str:
    return f"what is the number after {i}"


def test_question_and_answer() -> None:
    found = propose(rows(id=lambda i: i, question=text, answer=lambda i: f"it is {i + 1}"))
    assert (found.prompt, found.answer) == ("question: {question}\nanswer:", " {answer}")
    assert (found.choices, found.client, found.template, found.max_length) == (None, None, None, 32)


def test_labels_are_a_closed_set_and_branches_are_clients() -> None:
    fields = {"ticket": lambda i: f"T{i}", "branchOffice": lambda i: "ab"[i % 2], "body": text}
    found = propose(rows(**fields, team=lambda i: ("it", "pay")[i % 4 > 0]))
    assert (found.prompt, found.answer) == ("body: {body}\nteam:", " {team}")
    assert (found.choices, found.client) == (("pay", "it"), "branchOffice")


def test_a_label_that_is_rare_makes_no_closed_set() -> None:
    found = propose(rows(text=text, label=lambda i: "rare" if i == 3 else "yes" if i % 2 else "no"))
    assert (found.answer, found.choices) == (" {label}", None)


def test_several_columns_ask() -> None:
    found = propose(rows(context=text, question=text, created=text, answer=text, score=lambda i: i / 7))
    assert found.prompt == "context: {context}\nquestion: {question}\nanswer:"


def test_columns_that_are_called_nothing() -> None:
    found = propose(rows(a=text, b=lambda i: f"the {i}"))
    assert (found.prompt, found.answer) == ("a: {a}\nb:", " {b}")
    found = propose(rows(kind=lambda i: "xy"[i % 2], words=text))
    assert (found.prompt, found.answer, found.choices) == ("words: {words}\nkind:", " {kind}", ("x", "y"))


@pytest.mark.parametrize(
    ("fields", "template"),
    [
        ({"instruction": text, "input": text, "output": text, "source": lambda i: "ab"[i % 2]}, "chat"),
        ({"messages": lambda i: [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "chat"),
        ({"prompt": text, "completion": text}, "completion"),
    ],
)
def test_known_shapes_have_a_template(fields: dict[str, Any], template: str) -> None:
    found = propose(rows(**fields))
    assert (found.template, found.prompt, found.answer) == (template, None, None)
    assert found.client == ("source" if "source" in fields else None)


def test_the_length_follows_the_longest_row() -> None:
    long = propose(rows(question=lambda i: text(i) * (30 if i == 5 else 1), answer=text))
    assert long.max_length == 512
    assert propose(rows(question=lambda i: text(i) * 400, answer=text)).max_length == 1024


def test_columns_that_no_template_can_name_are_left_out() -> None:
    fields = {"1": text, "a.b": text, "{c}": text, "question": text, "answer": text}
    assert propose(rows(**fields)).prompt == "question: {question}\nanswer:"


@pytest.mark.parametrize(
    "fields", [{"text": text}, {"text": text, "tags": lambda i: ["x"]}, {"a.b": text, "c.d": text}]
)
def test_columns_without_a_pair_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        propose(rows(**fields))
    assert str(caught.value).startswith("rows.csv: no prompt and answer can be found among the columns (")


NAMES = st.sampled_from(["question", "answer", "label", "site", "text", "id", "x y", "Größe", "a.b", "7", "x!r", "y:z"])
CELL = st.one_of(st.text(st.characters(codec="utf-8"), max_size=8), st.integers(-9, 9), st.none())


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True).flatmap(
    lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, CELL)), min_size=1, max_size=30)
))  # fmt: skip
def test_what_is_proposed_reads_every_row_whose_cells_are_filled(fields: list[dict[str, Any]]) -> None:
    given_rows = [Row(row, "rows.csv", i) for i, row in enumerate(fields, 2)]
    try:
        found = propose(given_rows)
    except DataError:
        return
    assert isinstance(found, Proposal)
    assert found.prompt is not None
    assert found.answer is not None
    template = Template(found.prompt, found.answer)
    filled = [row for row in given_rows if all(v is not None and str(v).strip() for v in row.fields.values())]
    if filled:
        tokenise(filled, template, tiny_tokenizer(), max_length=4096, choices=found.choices)


def test_an_answer_that_was_chosen_and_one_that_was_rejected() -> None:
    found = propose(rows(prompt=text, chosen=lambda i: f"it is {i + 1}", rejected=lambda i: "no"))
    assert (found.template, found.preferences, found.prompt, found.choices) == ("chat", True, None, None)
    assert found.max_length == 32
    assert not propose(rows(prompt=text, completion=text)).preferences
