"""Templates: the texts that models are trained on, letter by letter."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.data.templates import NAMED, Chat, Jinja, Rendered, Template, answer_text, named, references, render

TOKENIZER = tiny_tokenizer()
SENTIMENT = Template("{input} It was", " {output}")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi {there}"},
    {"role": "assistant", "content": "Hello"},
]


def row(**fields: Any) -> Row:
    return Row(fields, "train.jsonl", 17)


def shown(name: str, **fields: Any) -> Rendered:
    return render(row(**fields), NAMED[name], TOKENIZER)


def complaint(template: Template | Chat, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        render(row(**fields), template, TOKENIZER)
    return str(caught.value)


def test_alpaca_is_the_standard_text() -> None:
    assert shown("alpaca", instruction="Add.", input="1 2", output="3") == Rendered(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:",
        "3",
    )


@pytest.mark.parametrize("fields", [{}, {"input": ""}, {"input": " \n"}, {"input": None}])
def test_alpaca_and_plain_without_an_input(fields: dict[str, Any]) -> None:
    assert shown("alpaca", instruction="Add.", output="3", **fields).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    assert shown("plain", instruction="Add.", output="3", **fields) == Rendered("Add.\n\n", "3")


def test_plain_and_completion() -> None:
    assert shown("plain", instruction="Add.", input="1 2", output=3) == Rendered("Add.\n\n1 2\n\n", "3")
    assert shown("completion", prompt="Once ", completion="more") == Rendered("Once ", "more")


def test_chat_takes_all_three_shapes() -> None:
    assert shown("chat", messages=TALK) == Rendered("<system>Be brief.\n<user>Hi {there}\n<assistant>", "Hello")
    assert shown("chat", prompt="Hi", completion="Yo") == Rendered("<user>Hi\n<assistant>", "Yo")
    assert shown("chat", instruction="Add.", input="1", output="3").prompt == "<user>Add.\n\n1\n<assistant>"
    assert shown("chat", instruction="Add.", input=None, output="3").prompt == "<user>Add.\n<assistant>"


def test_chat_names_what_is_wrong_with_messages() -> None:
    for messages, problem in (
        ("Hi", "field 'messages' is not a list of at least two messages"),
        (TALK[2:], "field 'messages' is not a list of at least two messages"),
        ([TALK[1], "Hello"], "message 2 is not an object with 'role' and 'content'"),
        ([TALK[1], {"role": "assistant"}], "message 2 is not an object with 'role' and 'content'"),
        ([TALK[1], {"role": "assistant", "content": None}], "the content of message 2 is null, not text"),
        (TALK[:2], "the last message is from 'user', not from the assistant"),
        (
            [TALK[1], {"role": "assistant", "content": " "}],
            "field 'messages' is empty: there is no answer to learn",
        ),
    ):
        assert complaint(NAMED["chat"], messages=messages) == f"train.jsonl:17: {problem}"


def test_chat_needs_a_template_that_takes_the_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(DataError, match=r"^train.jsonl:17: the tokenizer's chat template refuses the row \(no system"):
        render(row(messages=TALK), NAMED["chat"], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"^the tokenizer has no chat template"):
        render(row(messages=TALK), NAMED["chat"], tokenizer)


def test_complaints_name_file_line_and_columns() -> None:
    assert complaint(SENTIMENT, input="x", label=1) == (
        "train.jsonl:17: field 'output' is missing (present: input, label)"
    )
    assert complaint(NAMED["alpaca"], prompt="x", completion="y") == (
        "train.jsonl:17: field 'output' is missing (present: prompt, completion)"
    )
    assert complaint(NAMED["alpaca"], output="y") == (
        "train.jsonl:17: field 'instruction' is missing (present: output)"
    )
    assert complaint(SENTIMENT, input="x", output=["y"]) == "train.jsonl:17: field 'output' is a list, not text"
    assert complaint(SENTIMENT, input=None, output="y") == "train.jsonl:17: field 'input' is null"
    for blank in ("", " \n"):
        assert complaint(SENTIMENT, input="x", output=blank) == (
            "train.jsonl:17: field 'output' is empty: there is no answer to learn"
        )


@given(st.text(), st.text().filter(str.strip))
def test_text_goes_in_as_it_is(prompt: str, answer: str) -> None:
    fields = {"input": prompt + "{output}{0}{{", "output": "{input.__class__}" + answer}
    assert render(row(**fields), SENTIMENT, TOKENIZER) == Rendered(fields["input"] + " It was", " " + fields["output"])


def test_a_template_may_hold_doubled_braces_and_any_column_name() -> None:
    template = Template("{{{review text}}}", "{a-b}, {c}")
    assert render(row(**{"review text": "x", "a-b": 1, "c": "z"}), template, TOKENIZER) == Rendered("{x}", "1, z")


@pytest.mark.parametrize(
    "text", ["{a.b}", "{a[0]}", "{}", "{0}", "{a!r}", "{a:>9}", "{a:{b}}", "{", "}", "{ }", "{a.__class__}"]
)
def test_format_strings_may_only_name_columns(text: str) -> None:
    for parts in (("{a}" + text, "{a}"), ("{a}", "{a}" + text), ("{a}", "{a}", text)):
        with pytest.raises(DataError, match="template"):
            Template(*parts)


def test_an_answer_must_name_a_column() -> None:
    with pytest.raises(DataError, match=r"^the answer template ' yes' names no \{column\}$"):
        Template("{input}", " yes")


def test_names() -> None:
    assert all(named(name) is template for name, template in NAMED.items())
    with pytest.raises(DataError, match=r"^unknown template 'alpacca' \(known: alpaca, plain, completion, chat,"):
        named("alpacca")


def test_references_are_rendered_as_answers_are_and_start_with_the_one_trained_on() -> None:
    template = Template("{input}", " {output}.")
    data = row(input="x", output="a", references=["b", "a", 3])
    assert references(data, template, render(data, template, TOKENIZER).answer) == ("a.", "b.", "3.")
    assert references(row(output="a"), template, " a.") == ("a.",)
    assert references(row(messages=TALK, references=["Hey"]), NAMED["chat"], "Hello") == ("Hello", "Hey")
    for value, problem in (
        ("b", "field 'references' is not a list of texts"),
        (["b", None], "entry 2 of field 'references' is null, not text"),
    ):
        with pytest.raises(DataError) as caught:
            references(row(references=value), template, " a.")
        assert str(caught.value) == f"train.jsonl:17: {problem}"


LIST = Jinja(
    "{% if hint is defined %}({{ hint }}) {% endif %}{{ question }}\n{% for o in options %}- {{ o }}\n{% endfor %}",
    " {{ answer }}",
)


def test_jinja_takes_lists_and_columns_that_may_be_absent() -> None:
    fields = {"question": "Which {one}?", "options": ["a", "b{{c}}"], "answer": 3}
    plain = Row(fields, "train.jsonl", 17)
    assert render(plain, LIST, tiny_tokenizer()) == Rendered("Which {one}?\n- a\n- b{{c}}\n", " 3")
    for hint, start in ((None, "Which"), ("sums", "(sums) Which")):
        row = Row({**fields, "hint": hint}, "train.jsonl", 17)
        assert render(row, LIST, tiny_tokenizer()).prompt.startswith(start)
    assert answer_text(LIST, "4") == " 4"
    assert references(Row({**fields, "references": ["three"]}, "x", 1), LIST, " 3") == ("3", "three")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"answer": "x", "options": []}, "the Jinja template uses what the row lacks: 'question' is undef"),
        ({"question": "q", "options": 3, "answer": "x"}, "the Jinja template fails on the row ('int' object is"),
        ({"question": "q", "options": [], "answer": " "}, "the answer is empty: there is no answer to learn"),
        ({"question": "\ud83d", "options": [], "answer": "x"}, "field 'question' holds one half of a surrogate pair"),
    ],
)  # fmt: skip
def test_jinja_complaints_name_the_row(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        render(Row(fields, "train.jsonl", 17), LIST, tiny_tokenizer())
    assert str(caught.value).startswith(f"train.jsonl:17: {problem}")


def test_jinja_templates_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match=r"^the Jinja template '\{% if x %\}' cannot be read \(line 1: Unexpected end"):
        Jinja("{% if x %}", "{{ y }}")
    with pytest.raises(DataError, match=r"^the answer template 'yes' uses no column$"):
        Jinja("{{ x }}", "yes")
    with pytest.raises(DataError, match=r"must name one \{column\} here, not 2$"):
        answer_text(Jinja("{{ x }}", "{{ y }}{{ z }}"), "a")
    with pytest.raises(DataError, match=r"cannot be read \(line 1: No filter named 'random'"):
        Jinja("{{ x | random }}", "{{ y }}")  # the same rows are the same prompts
    # templates are sandboxed: what stands behind an object is out of their reach
    with pytest.raises(DataError, match=r"^a:1: the Jinja template fails on the row \(access to attribute"):
        render(Row({"x": "a", "y": "b"}, "a", 1), Jinja("{{ x.__class__.__mro__ }}", "{{ y }}"), tiny_tokenizer())
