"""Chat templates of the kinds that public models have, each held to transformers' own rendering of the whole talk."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from tiny import BOS, EOS, tiny_tokenizer
from tokenizers import AddedToken

from thinwire.data import chat, rendering
from thinwire.data.batch import Dataset
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.data.templates import NAMED, render
from thinwire.data.tokenise import tokenise

QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml, a system prompt of its own": QWEN,
    "a closed thought in the last turn": THINKING,
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3, dated": (
        "{{ bos_token }}<|start|>system<|h|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}<|end|>"
        "{% for m in messages %}<|start|>{{ m.role }}<|h|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|h|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
    ),
    "phi 3, an end of the text at the end": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "harmony": (
        "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
        "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "two tokens at the end": (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|return|><|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "marked for generation": (
        "{% for m in messages %}<|start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    ),
    "the prompt opens a thought": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}<eos>"
        "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
}
MARKS = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|h|>", "<|message|>", "<|channel|>", "<|return|>")
USER, REPLY = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two, say."}
TALK = [USER, REPLY, {"role": "user", "content": " Three? "}, {"role": "assistant", "content": "Four.\n\nFive. "}]


def speaker(template: Any, *, bos: bool = False) -> Any:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in MARKS]})
    tokenizer.chat_template = template
    return tokenizer


def row(messages: Any, **fields: Any) -> Row:
    return Row({"messages": messages, **fields}, "talk.jsonl", 7)


def read(messages: Any, template: Any, tokenizer: Any = None, **fields: Any) -> Dataset:
    return tokenise([row(messages, **fields)], NAMED["chat"], tokenizer or speaker(template), max_length=10_000)


def complaint(messages: Any, template: Any = QWEN, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(messages, template, **fields)
    return str(caught.value)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock that templates see stands still for transformers' own rendering too."""
    from transformers.utils import chat_template_utils

    class Clock:
        now = staticmethod(lambda: rendering.CLOCK)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", [TALK, TALK[:2]], ids=["two turns", "one turn"])
def test_the_tokens_are_those_of_the_whole_talk(name: str, talk: list[dict[str, str]]) -> None:
    tokenizer = speaker(TEMPLATES[name])
    data = read(talk, None, tokenizer)
    (example,) = data.examples
    whole = tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"]
    tokens = [*example.prompt, *example.answer]
    assert tokens == whole[: len(tokens)]
    assert not tokenizer.decode(whole[len(tokens) :]).replace("<eos>", "").strip()
    answer = tokenizer.decode(example.answer)
    (end,) = data.ends
    assert answer.endswith(end)
    assert answer.removesuffix(end).strip() == talk[-1]["content"].strip()
    # a row that asks the same has the same prompt, whatever the answer
    other = read([*talk[:-1], {"role": "assistant", "content": "-5\n"}], None, tokenizer)
    assert other.examples[0].prompt == example.prompt


def test_what_is_between_the_question_and_the_answer_is_read() -> None:
    for name, expected in (
        ("a closed thought in the last turn", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("harmony", "<|start|>assistant<|channel|>final<|message|>"),
        ("llama 2", " [/INST] "),
        ("the prompt opens a thought", "<|assistant|>"),
        ("marked for generation", "<|start|>assistant\n"),
    ):
        data = read(TALK[:2], TEMPLATES[name])
        assert data.examples[0].text.endswith(expected), name
        # the space that ends llama 2's prompt is the answer's first token where it is served
        assert any("generation prompt is not what it writes" in n for n in data.notes) == (name != "llama 2"), name
    assert not read(TALK[:2], QWEN).notes[1:]


def test_a_thought_is_trained_with_the_answer_where_the_template_writes_it() -> None:
    for last in (
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."},
    ):
        data = read([USER, last], THINKING)
        assert data.examples[0].text.endswith("<|im_start|>assistant\n")
        assert data.examples[0].references == ("<think>\nHm.\n</think>\n\nYes.",)
        assert data.ends == ("<|im_end|>",)
    assert "the chat template leaves out the thought of the answer" in read([USER, last], QWEN).notes
    opened, last = TEMPLATES["the prompt opens a thought"], {"role": "assistant", "content": "<think>Hm.</think>Yes."}
    assert complaint([USER, last], opened).startswith(
        "talk.jsonl:7: the tokenizer's chat template writes the answer '<think>Hm.</think>Yes.' as 'Yes.'; data.prompt"
    )


def test_calls_of_tools_and_further_roles() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "rain", "arguments": {"at": 1}}}],
    }
    data = read([USER, call], QWEN)
    assert data.examples[0].references == ('<tool_call>\n{"name": "rain", "arguments": {"at": 1}}\n</tool_call>',)
    assert data.examples[0].text.endswith("<|im_start|>assistant\n")
    tokenizer = speaker(QWEN)
    talk = [
        USER,
        call,
        {"role": "tool", "content": "dry", "tool_call_id": "1"},
        {"role": "assistant", "content": "No."},
    ]
    (example,) = read(talk, None, tokenizer).examples
    assert [*example.prompt, *example.answer, ord("\n")] == tokenizer.apply_chat_template(talk)["input_ids"]
    gone = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    assert complaint([USER, call], gone) == "talk.jsonl:7: the tokenizer's chat template writes nothing of the answer"
    both = {**call, "content": "Let me see."}
    assert "the chat template leaves out the answer's calls of tools" in read([USER, both], gone).notes
    del call["tool_calls"]
    assert complaint([USER, call]) == "talk.jsonl:7: the content of message 2 is null, not text"


def test_tools_and_keys_of_messages_reach_the_template() -> None:
    template = (
        "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
        "{% for m in messages %}<|start|>{{ m.name | default(m.role) }}\n{{ m.content }}<|end|>{% endfor %}"
    )
    talk = [{**USER, "name": "ann"}, {**REPLY, "name": "bob"}]
    for tools in ([{"name": "rain"}], '[{"name": "rain"}]'):
        assert read(talk, template, tools=tools).examples[0].text == "[rain]<|start|>ann\nOne?<|end|><|start|>bob\n"
    for nothing in (None, [], ""):
        assert read(talk, template, tools=nothing).examples[0].text.startswith("<|start|>ann")
    assert "the chat template leaves out the tools of the rows" in read(TALK, QWEN, tools=[{"name": "rain"}]).notes
    assert complaint(TALK, template, tools="rain") == "talk.jsonl:7: field 'tools' is not a list"
    assert "chat template fails on the row" in complaint(TALK, template, tools=["rain"])
    named = {"default": QWEN, "tool_use": template}
    assert read(talk, named, tools=[{"name": "rain"}]).examples[0].text.startswith("[rain]")
    assert read(talk, named).examples[0].text.startswith("<|im_start|>system")
    assert "multiple chat templates" in complaint(talk, {"rag": QWEN})


def test_contents_in_parts() -> None:
    parts = [{"type": "text", "text": "One?", "image": None}]
    assert read([{"role": "user", "content": parts}, REPLY], QWEN) == read([USER, REPLY], QWEN)
    assert "One?\nTwo?" in read([{"role": "user", "content": [*parts, "Two?"]}, REPLY], QWEN).examples[0].text
    for part, what in (
        ({"type": "image", "url": "x"}, "of type 'image'"),
        (3, "a number"),
        ({"text": None}, "an object"),
    ):
        problem = complaint([{"role": "user", "content": [*parts, part]}, REPLY])
        assert problem == f"talk.jsonl:7: part 2 of the content of message 1 is {what}, not text"


def test_what_a_template_leaves_out_is_reported_or_refused() -> None:
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert complaint(TALK, users).endswith("writes the assistant's answer 0 times, not once")
    twice = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}"
    assert complaint(TALK, twice).endswith("writes the assistant's answer 2 times, not once")
    mute = "{% for m in messages if m.role != 'system' %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    notes = read([{"role": "system", "content": "Be brief."}, *TALK], mute).notes
    assert "the chat template leaves out or changes the text of the role 'system'" in notes
    assert not any("leaves out" in note for note in read(TALK, mute).notes)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no system messages') }}", "refuses the row (no system messages)"),
        ("{{ messages[0].content + 1 }}", "fails on the row ("),
        ("{{ nothing.at_all }}", "refuses the row ('nothing' is undefined)"),
        ("{% for %}", "refuses the row ("),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the row ("),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails on the row (Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 0.2 sec"),
        ("{{ '\\ud83d' }}{{ messages[-1].content }}", "holds one half of a surrogate pair"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "PATIENCE", 0.2)
    found = complaint(TALK, template)
    assert found.startswith("talk.jsonl:7: ")
    assert problem in found
    assert "\n" not in found


def test_dates_and_draws_are_the_same_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    template = "{{ strftime_now('%d %b %Y') }}{{ ['a', 'b', 'c', 'd', 'e', 'f'] | random }}" + QWEN
    found = []
    for day in (1, 2, 3):

        class Clock:
            now = staticmethod(lambda day=day: datetime.datetime(2031, 1, day))

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        found.append(read(TALK, template))
    assert found[0] == found[1] == found[2]
    assert found[0].examples[0].text.startswith("26 Jul 2024a")
    assert "the chat template asks for the date: it is 26 July 2024 in all prompts, whatever the day" in found[0].notes
    assert "the chat template draws at random: it always gets the first" in found[0].notes
    assert chat_template_utils.datetime is Clock


def test_ends() -> None:
    tokenizer = speaker("{% for m in messages %}<|start|>{{ m.content }}[E]\n{% endfor %}")
    data = read(TALK, None, tokenizer)
    assert data.ends == ("[E]",)
    assert data.examples[0].answer == (*b"Four.\n\nFive. [E]", EOS)
    assert any("ends an answer with the text '[E]'" in note for note in data.notes)
    data = read(TALK, "{% for m in messages %}<|start|>{{ m.content }}\n{% endfor %}")
    assert (data.ends, data.examples[0].answer) == ((), (*b"Four.\n\nFive. ", EOS))
    assert chat.stops(tokenizer, ["[E]", " <|return|><|end|>"])[1] == ("[E]",)
    ids = tokenizer.convert_tokens_to_ids(["<|return|>", "<|end|>"])
    assert chat.stops(tokenizer, ["[E]", " <|return|><|end|>"])[0] == set(ids)
    tokenizer = speaker(QWEN)
    tokenizer.eos_token = None
    assert read(TALK, None, tokenizer).ends == ("<|im_end|>",)
    bare = tokenise([row(TALK)], NAMED["chat"], speaker(QWEN), max_length=1000, eos=False)
    assert bare.examples[0].answer == tuple(b"Four.\n\nFive. ")


def test_bos_is_there_once_and_reported_where_the_template_has_none() -> None:
    data = read(TALK, None, speaker(QWEN, bos=True))
    assert data.examples[0].prompt.count(BOS) == 1
    assert any("does not begin with '<bos>'" in note for note in data.notes)
    data = read(TALK, None, speaker(TEMPLATES["gemma"], bos=True))
    assert data.examples[0].prompt.count(BOS) == 1
    assert not any("does not begin" in note for note in data.notes)


def test_choices_are_candidates_as_the_template_writes_them() -> None:
    rows = [row([USER, {"role": "assistant", "content": f" {answer}"}]) for answer in ("yes", "no")]
    data = tokenise(rows, NAMED["chat"], speaker(TEMPLATES["gemma"]), max_length=99, choices=[" yes", " no"])
    assert data.candidates == (tuple(b"yes"), tuple(b"no"))
    assert [example.choice for example in data.examples] == [0, 1]
    with pytest.raises(DataError, match=r"the choices ' no' and 'no ' have the same tokens"):
        tokenise(rows[1:], NAMED["chat"], speaker(TEMPLATES["gemma"]), max_length=99, choices=[" no", "no "])


def test_rows_of_several_shapes_are_read_by_the_one_that_has_values() -> None:
    full = {"instruction": "One?", "output": "Two, say."}
    expected = render(Row(full, "a", 1), NAMED["chat"], speaker(QWEN))
    for other in (
        {"completion": None, "prompt": None},
        {"completion": ""},
        {"messages": None},
        {"messages": []},
        {"messages": float("nan"), "completion": float("nan"), "input": float("nan")},
    ):
        assert render(Row({**full, **other}, "a", 1), NAMED["chat"], speaker(QWEN)) == expected
    nulls = dict.fromkeys(full)
    assert render(row([USER, REPLY], **nulls), NAMED["chat"], speaker(QWEN)) == expected
    notes = render(row([USER, REPLY], **full), NAMED["chat"], speaker(QWEN)).notes
    assert notes == ("rows with several answers: 'messages' is read, 'output' not",)
    with pytest.raises(DataError, match=r"^a:1: field 'conversations' is not read: name it 'messages'"):
        render(Row({"conversations": [{"from": "human", "value": "One?"}]}, "a", 1), NAMED["chat"], speaker(QWEN))
    with pytest.raises(DataError, match=r"^a:1: field 'messages' is null$"):
        render(Row({"messages": None}, "a", 1), NAMED["chat"], speaker(QWEN))
