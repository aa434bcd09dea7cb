"""Preference rows, in the shapes that people have them in, and as examples of two answers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny import EOS, tiny_tokenizer

from thinwire.data.batch import Dataset, collate
from thinwire.data.errors import DataError, NoRowsLeft
from thinwire.data.preference import sides
from thinwire.data.rows import Row
from thinwire.data.templates import NAMED, AnyTemplate, Chat, Jinja, Template
from thinwire.data.tokenise import tokenise_groups


def row(line: int = 1, **fields: Any) -> Row:
    return Row(fields, "pairs.jsonl", line)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TEXTS = row(prompt="Hello?", chosen="Good day.", rejected="What?")


def prefer(rows: list[Row], template: AnyTemplate, rejected: AnyTemplate | None = None, **options: Any) -> Dataset:
    """The rows under a named template, or of the user's own, whose `rejected` is given."""
    pairs = [sides(each, template) if rejected is None else (each, each) for each in rows]
    better, worse = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    settings: dict[str, Any] = {"max_length": 200, "too_long": "answer"} | options
    (found,) = tokenise_groups(
        [better], template, tiny_tokenizer(), rejected=([worse], rejected or template), **settings
    )
    return found


def text(tokens: tuple[int, ...]) -> str:
    assert tokens[-1] == EOS
    return bytes(tokens[:-1]).decode()


@pytest.mark.parametrize(
    "fields",
    [
        TEXTS.fields,
        {"instruction": "Hello?", "chosen": "Good day.", "rejected": "What?"},
        {"prompt": [user("Hello?")], "chosen": [assistant("Good day.")], "rejected": [assistant("What?")]},
        {"prompt": "Hello?", "chosen": [assistant("Good day.")], "rejected": [assistant("What?")]},
        {"prompt": [user("Hello?")], "chosen": "Good day.", "rejected": "What?"},
        {
            "prompt": "Hello?",  # which the talks have in them
            "chosen": [user("Hello?"), assistant("Good day.")],
            "rejected": [user("Hello?"), assistant("What?")],
        },
        {"chosen": [user("Hello?"), assistant("Good day.")], "rejected": [user("Hello?"), assistant("What?")]},
    ],
)
def test_every_shape_is_the_same_talk(fields: dict[str, Any]) -> None:
    (example,) = prefer([row(**fields)], Chat()).examples
    assert bytes(example.prompt).decode() == "<user>Hello?\n<assistant>"
    assert (text(example.answer), text(example.rejected)) == ("Good day.", "What?")
    assert (example.references, example.place, example.reference) == (("Good day.",), "pairs.jsonl:1", None)
    assert len(example) == len(example.prompt) + len(example.answer)


@pytest.mark.parametrize(
    ("fields", "template", "rejected"),
    [
        (TEXTS.fields, NAMED["completion"], None),
        ({"a": "Hello?", "b": "Good day.", "c": "What?"}, Template("{a}", "{b}"), Template("{a}", "{c}")),
        (
            {"a": "Hello?", "b": ["What?", "Good day."]},
            Jinja("{{ a }}", "{{ b[1] }}"),
            Jinja("{{ a }}", "{{ b[0] }}"),
        ),
    ],
)
def test_templates_without_turns(fields: dict[str, Any], template: AnyTemplate, rejected: AnyTemplate | None) -> None:
    (example,) = prefer([row(**fields)], template, rejected).examples
    assert bytes(example.prompt).decode() == "Hello?"
    assert (text(example.answer), text(example.rejected)) == ("Good day.", "What?")


def test_instructions_keep_their_prompt() -> None:
    fields = {"instruction": "Greet.", "input": "Ann", "chosen": "Dear Ann", "rejected": "You"}
    (example,) = prefer([row(**fields)], NAMED["plain"]).examples
    assert bytes(example.prompt).decode() == "Greet.\n\nAnn\n\n"
    assert (text(example.answer), text(example.rejected)) == ("Dear Ann", "You")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing (present: prompt, chosen)"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected' is null"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "field 'rejected' is empty: there is no answer to learn"),
        ({"prompt": "a", "chosen": [], "rejected": []}, "field 'chosen' is an empty list: there is no answer to learn"),
        ({"chosen": "b", "rejected": "c"}, "field 'prompt' is missing (present: chosen, rejected)"),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "field 'prompt' is missing"),
        ({"chosen": [user("b")], "rejected": [user("c")]}, "field 'messages' is not a list of at least two messages"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("z"), assistant("c")]},
            "the chosen and the rejected answer do not follow the same messages",
        ),
    ],
)
def test_what_is_no_preference_is_one_line(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape('pairs.jsonl:7: ' + line)}[^\n]*$"):
        prefer([TEXTS, row(7, **fields)], Chat())


def test_a_list_needs_the_chat_template() -> None:
    with pytest.raises(DataError, match=r"^pairs\.jsonl:1: field 'chosen' is a list, not text$"):
        prefer([row(prompt="a", chosen=[assistant("b")], rejected=[assistant("c")])], NAMED["completion"])


def test_both_answers_have_to_fit() -> None:
    long = row(2, prompt="Hello?", chosen="Good day.", rejected="What? " * 10)
    plain = NAMED["completion"]
    data = prefer([TEXTS, long], plain, max_length=20)
    assert (data.cut, data.dropped) == (1, 0)
    assert bytes(data.examples[1].rejected).decode() == "What? What? Wh"
    assert text(data.examples[1].answer) == "Good day."
    data = prefer([TEXTS, long], plain, max_length=20, too_long="drop")
    assert (len(data), data.dropped) == (1, 1)
    with pytest.raises(NoRowsLeft):
        prefer([long], plain, max_length=20, too_long="drop")


def test_a_batch_has_both_answers_of_an_example_one_after_the_other() -> None:
    other = row(2, prompt="Bye", chosen="So long.", rejected="No.")
    examples = prefer([TEXTS, other], NAMED["completion"]).examples
    batch = collate(examples, 0, beta=0.5)
    assert (batch.kind, batch.examples, batch.candidates, batch.beta) == ("preference", 2, 2, 0.5)
    assert (batch.choice, batch.reference) == (None, None)
    answers = [[t for t in labels if t >= 0] for labels in batch.labels.tolist()]
    assert [text(tuple(tokens)) for tokens in answers] == ["Good day.", "What?", "So long.", "No."]
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths == [len(e.prompt) + len(tokens) for e in examples for tokens in (e.answer, e.rejected)]
