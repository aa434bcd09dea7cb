"""What `thinwire chat` feeds the model is what the run trains and evaluates on, and what it prints is harmless."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOS, CHOICES, EOS, tiny_encoder, tiny_model, tiny_tokenizer
from tokenizers import processors

from thinwire import assemble, config
from thinwire.commands import chat
from thinwire.data.rows import Row
from thinwire.data.tokenise import tokenise
from thinwire.evaluate.text import generate
from thinwire.keys import Key
from thinwire.model.net import Net

LINE = "Is it dry?"
TALKS = (
    "{% for m in messages %}<{{ m.role }}>{{ ' ' if m.role == 'assistant' }}{{ m.content | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def opened(folder: Path, around: str = "$A", template: str | None = TALKS) -> Net:
    """The tiny model, with a tokenizer that puts what is `around` round every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer.chat_template = template
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Net.open(str(folder))


def data_of(**fields: Any) -> config.Data:
    tree = {"name": "talk", "model": {"path": "m"}, "method": {"name": "fedavg"}, "data": {"path": "x.jsonl", **fields}}
    return config.parse(tree).data


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """The tokens that a talk of some lines gives the model."""

    def listen(net: Net, data: config.Data | None, *lines: str) -> list[list[int]]:
        found: list[list[int]] = []
        made = net.model.generate

        def watched(**fields: Any) -> Any:
            found.append(fields["input_ids"][0].tolist())
            return made(**fields)

        monkeypatch.setattr(net.model, "generate", watched)
        answer = chat._talker(net, data, 4, 0.0)
        for line in lines:
            answer(line)
        return found

    return listen


@pytest.mark.parametrize("around", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"template": "plain"}, {"instruction": LINE, "output": "x"}),
        ({"template": "alpaca"}, {"instruction": LINE, "output": "x"}),
        ({"template": "completion"}, {"prompt": LINE, "completion": "x"}),
        ({"template": "chat"}, {"instruction": LINE, "output": "x"}),
        ({"prompt": "Q: {q}\nA:", "answer": " {a}"}, {"q": LINE, "a": "x"}),
        ({"template": "jinja", "prompt": "Q: {{ q }}\nA:", "answer": " {{ a }}"}, {"q": LINE, "a": "x"}),
        (
            {
                "template": "jinja",
                "prompt": "{% if hint is defined %}{{ hint }}\n{% endif %}{{ q }}",
                "answer": "{{ a }}",
            },
            {"q": LINE, "a": "x"},
        ),
    ],
    ids=lambda value: value.get("template", "own") if "template" in value or "prompt" in value else "",
)
def test_a_line_is_read_as_a_row_is(
    settings: dict[str, Any], fields: dict[str, Any], around: str, tmp_path: Path, fed: Callable[..., list[list[int]]]
) -> None:
    net, data = opened(tmp_path, around), data_of(**settings)
    row = assemble.dataset(data, [Row(fields, "x.jsonl", 1)], net.tokenizer).examples[0]
    assert fed(net, data, LINE) == [list(row.prompt)]


def test_a_talk_is_read_as_a_row_of_messages_is(tmp_path: Path, fed: Callable[..., list[list[int]]]) -> None:
    net, data = opened(tmp_path, "<bos> $A"), data_of(template="chat")
    first, second = fed(net, data, "One?", "Two?")
    held = assemble.dataset(data, [Row({"prompt": "One?", "completion": "-"}, "x", 1)], net.tokenizer)
    (answer,) = generate(net.model, net.tokenizer, held, 4, 1)
    talk = [("user", "One?"), ("assistant", answer), ("user", "Two?"), ("assistant", "-")]
    row = Row({"messages": [{"role": role, "content": text} for role, text in talk]}, "x", 1)
    assert first == list(held.examples[0].prompt)
    assert second == list(tokenise([row], assemble.template_of(data), net.tokenizer, max_length=999).examples[0].prompt)


def test_a_folder_that_is_no_run(tmp_path: Path, fed: Callable[..., list[list[int]]]) -> None:
    assert fed(opened(tmp_path / "a"), None, "hi") == [[*b"<user>hi", EOS, *b"<assistant> "]]
    bare = opened(tmp_path / "b", "<bos> $A <eos>", None)
    assert fed(bare, None, "hi", "you") == [[BOS, *b"hi"], [BOS, *b"you"]]


@pytest.mark.parametrize("template", [TALKS, "{% for m in messages %}{{ m.content }}[E]{% endfor %}"])
def test_what_is_generated_steers_no_terminal_and_ends_where_turns_do(
    template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = opened(tmp_path, template=template)
    hostile = b"a\x1b]0;title\x07 b\xc2\x9b1m\xe2\x80\xae\n\tc[E]d"

    def generate(*, input_ids: torch.Tensor, streamer: Any = None, **_: Any) -> torch.Tensor:
        made = torch.tensor([[*input_ids[0].tolist(), *hostile, EOS]])
        if streamer is not None:
            for token in (input_ids, *made[0, input_ids.shape[1] :].split(1)):
                streamer.put(token)
            streamer.end()
        return made

    monkeypatch.setattr(net.model, "generate", generate)
    chat._talker(net, data_of(template="chat"), 4, 0.0)("hi")
    end = "" if "[E]" in template else "[E]d"
    assert capsys.readouterr().out == r"a\x1b]0;title\x07 b\x9b1m\u202e" + f"\n\tc{end}\n"


def test_a_classifier_reads_a_line_as_it_reads_a_row(tmp_path: Path) -> None:
    net = Net.open(str(tiny_encoder(tmp_path)), classes=CHOICES, head_key=Key.root(0))
    data = data_of(prompt="Review: {text}", answer="{label}", choices=CHOICES, max_length=12)
    row = Row({"text": LINE, "label": CHOICES[0]}, "x", 1)
    expected = assemble.dataset(data, [row], net.tokenizer, CHOICES).examples[0].prompt
    found: list[Any] = []
    net.model.register_forward_pre_hook(lambda _, args, fields: found.append(fields["input_ids"]), with_kwargs=True)
    chat._chooser(net, data, CHOICES, True)(LINE)
    assert [tokens[0].tolist() for tokens in found] == [list(expected)]


def test_a_closed_set_under_jinja_is_chosen_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = opened(tmp_path)
    data = data_of(template="jinja", prompt="{{ q }}:", answer=" {{ a }}", choices=CHOICES)
    chat._chooser(net, data, CHOICES, False)(LINE)
    assert capsys.readouterr().out.split()[0] in CHOICES


def test_a_temperature_draws_and_the_settings_of_the_model_stay(tmp_path: Path) -> None:
    net, seen = opened(tmp_path), []
    net.model.generation_config.top_k = 7
    made = net.model.generate

    def watched(**fields: Any) -> Any:
        seen.append(net.model.generation_config.to_dict())
        return made(**fields)

    net.model.generate = watched
    own = net.model.generation_config
    with torch.random.fork_rng(devices=[]):
        chat._talker(net, None, 2, 0.5)("hi")
    chat._talker(net, None, 2, 0.0)("hi")
    assert [seen[0][name] for name in ("do_sample", "temperature", "top_k")] == [True, 0.5, 7]
    assert seen[1]["do_sample"] is False
    assert net.model.generation_config is own
