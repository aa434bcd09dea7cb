"""A Modelfile writes a talk as the model's own chat template does, or says that it does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny import CHAT, tiny_tokenizer

from thinwire.assemble.modelfile import modelfile
from thinwire.config import Data

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
COUNTS = "{% for m in messages %}<{{ loop.index }} {{ m.role }}>{{ m.content }}\n{% endfor %}"
QUOTES = '{% for m in messages %}"""{{ m.role }}"""{{ m.content }}\n{% endfor %}'
TALKS = [
    [("user", "One?")],
    [("user", "One?"), ("assistant", "Two."), ("user", "Three?")],
    [("system", "Brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?")],
]


def data(**fields: Any) -> Data:
    return Data.model_validate({"path": "none", **fields})


def gone(text: str, talk: list[tuple[str, str]]) -> str:
    """What Ollama would write: the few words of Go's templates that a Modelfile of ours has."""
    (template,) = re.findall('TEMPLATE """(.*?)"""', text, re.DOTALL)
    default = re.findall('SYSTEM """(.*?)"""', text, re.DOTALL)
    if default and talk[0][0] != "system":
        talk = [("system", default[0]), *talk]
    turns = r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}"
    ((before, inner),) = re.findall(turns, template, re.DOTALL)
    parts = re.split(r"\{\{ (?:else )?if eq \.Role \"(\w+)\" \}\}", inner)
    around = dict(zip(parts[1::2], parts[2::2], strict=True))
    return before + "".join(around[role].replace("{{ .Content }}", content) for role, content in talk)


@pytest.mark.parametrize(("template", "systems"), [(CHAT, True), (SMOL, True), (GEMMA, False)])
def test_a_talk_is_written_as_the_chat_template_does(template: str, systems: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text, left = modelfile("m.gguf", data(template="chat"), tokenizer)
    assert text.startswith("FROM ./m.gguf\n")
    for talk in TALKS if systems else TALKS[:2]:
        messages = [{"role": role, "content": content} for role, content in talk]
        right = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert gone(text, talk) == right
    assert any("system messages" in line for line in left) != systems
    assert "PARAMETER temperature 0\n" in text
    assert 'PARAMETER stop "<eos>"\n' in text


def test_how_it_looks() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SMOL
    text, left = modelfile("m.gguf", data(template="chat"), tokenizer)
    assert left == []
    assert text == (
        'FROM ./m.gguf\nTEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n'
        'SYSTEM """Be kind."""\nPARAMETER temperature 0\n'
        'PARAMETER stop "<eos>"\nPARAMETER stop "<|im_end|>"\n'
    )


def test_a_start_token_that_llama_cpp_puts_is_not_there_twice() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = GEMMA
    text, _ = modelfile("m.gguf", data(template="chat"), tokenizer)
    assert "<bos>" not in text
    assert "{{ range" in text
    tokenizer.chat_template = SMOL
    assert "the start token" in modelfile("m.gguf", data(template="chat"), tokenizer)[0]


@pytest.mark.parametrize("template", [COUNTS, QUOTES])
def test_what_is_not_the_same_at_each_turn_is_said(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text, left = modelfile("m.gguf", data(template="chat"), tokenizer)
    assert "TEMPLATE" not in text
    assert "# not translated: the chat template" in text
    assert len(left) == 1


def test_the_prompt_of_a_run() -> None:
    own = {"prompt": "Film: {input}\nIt was", "answer": " {output}"}
    text, left = modelfile("m.gguf", data(**own), tiny_tokenizer())
    assert 'TEMPLATE """Film: {{ .Prompt }}\nIt was"""\n' in text
    assert left == []
    text, left = modelfile("m.gguf", data(choices=["good", "bad"], **own), tiny_tokenizer())
    assert "# not translated: the closed set of answers" in text
    twice = data(prompt="{input} {input}", answer="{output}")
    assert "TEMPLATE" not in modelfile("m.gguf", twice, tiny_tokenizer())[0]
    braces = data(prompt="{{{{ if }}}} {input}", answer="{output}")
    assert "TEMPLATE" not in modelfile("m.gguf", braces, tiny_tokenizer())[0]
