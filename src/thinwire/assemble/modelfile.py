"""Ollama's Modelfile of an exported model: where its weights are, how a talk is written, where an answer ends.

A chat template is a program in Jinja, Ollama's TEMPLATE one of Go. What is translated is what the first writes: the
text around each message of a talk. Where that is not the same at each turn, the file says so and has no TEMPLATE.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, NamedTuple

from thinwire.assemble.asked import row_of
from thinwire.assemble.rows import template_of
from thinwire.config import Data
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.data.templates import AnyTemplate, Chat, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "qz{}zq"  # a text that no template has, which none of them trims or splits


class Turns(NamedTuple):
    """What a chat template writes around messages; `before` all, and the system message that it has by itself."""

    before: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    ends: str  # what follows an answer
    default: str | None

    def written(self, talk: list[tuple[str, str]]) -> str:
        """A talk that ends with a question, up to the answer."""
        system = self.system or ("", "")
        around = {"system": system, "user": self.user, "assistant": ("", self.ends)}
        if self.default is not None and talk[0][0] != "system":
            talk = [("system", self.default), *talk]
        return self.before + "".join(around[role][0] + text + around[role][1] for role, text in talk)

    def template(self) -> str:
        """The same as a template of Go."""
        content = "{{ .Content }}"
        parts = [] if self.system is None else [f'if eq .Role "system" }}}}{self.system[0]}{content}{self.system[1]}']
        parts.append(f'if eq .Role "user" }}}}{self.user[0]}{content}{self.user[1]}')
        parts.append(f'if eq .Role "assistant" }}}}{content}{self.ends}')
        return f"{self.before}{{{{ range .Messages }}}}{{{{ {'{{ else '.join(parts)}{{{{ end }}}}{{{{ end }}}}"


def modelfile(gguf: str, data: Data, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The text of a Modelfile for the GGUF file of that name beside it, and what could not be translated."""
    template, left = template_of(data), list[str]()
    lines = [f"FROM ./{gguf}"]
    if isinstance(template, Chat):
        found = _turns(tokenizer)
        if found is not None and _sayable(found.template()):
            if _starts(tokenizer) and found.before.startswith(str(tokenizer.bos_token)):
                found = found._replace(before=found.before.removeprefix(str(tokenizer.bos_token)))  # llama.cpp puts it
            elif _starts(tokenizer):
                left.append("the start token, which llama.cpp puts in front and this chat template does not")
            lines.append(f'TEMPLATE """{found.template()}"""')
            if found.default is not None:
                lines.append(f'SYSTEM """{found.default}"""')
            if found.system is None:
                left.append("system messages: this chat template takes none")
        else:
            left.append("the chat template: it does not write each turn alike (the one in the GGUF file is whole)")
    elif (shown := _prompt(template, tokenizer)) is not None and _sayable(shown):
        lines.append(f'TEMPLATE """{shown}"""')
    else:
        left.append("the prompt of the run: a line does not stand in it once, as it is")
    if data.choices is not None:
        left.append("the closed set of answers: the model is free to answer otherwise")
    elif data.words is not None:
        left.append("data.words: the answers are the words that were trained")
    lines.append("PARAMETER temperature 0")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in _stops(template, tokenizer) if '"' not in stop]
    lines += [f"# not translated: {text}" for text in left]
    return "\n".join(lines) + "\n", left


def _turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """What the chat template writes around messages; None where that is not the same in each place."""
    roles = ("user", "assistant") * 2 + ("user",)
    talk = [(role, MARK.format(i)) for i, role in enumerate(roles)]
    asked = ("system", MARK.format("s"))
    try:
        one, two = (_rendered(talk[:n], tokenizer) for n in (1, 3))
        cut = _cut(two, talk[:3])
        if cut is None or len(cut) != 4:
            return None
        first, answered, again, last = cut
        # what ends an answer is no part of the next question, though a system message may end alike
        user = _common_end(first, again.removeprefix(_end(tokenizer))).lstrip("\n")
        before, ends = first.removesuffix(user), again.removesuffix(user)
        found = Turns(before, None, (user, last), ends, None)
        if answered != last:
            return None
    except DataError:
        return None
    try:
        cut = _cut(_rendered([asked, talk[0]], tokenizer), [asked, talk[0]])
    except DataError:
        cut = None
    if cut is not None and len(cut) == 3 and cut[1].endswith(user) and cut[2] == last:
        system = cut[0], cut[1].removesuffix(user)
        if before.startswith(system[0]) and before.endswith(system[1]) and len(before) > len("".join(system)):
            own = before[len(system[0]) : len(before) - len(system[1])]
            found = found._replace(before="", system=system, default=own)
        elif system[0].startswith(before):
            found = found._replace(system=(system[0].removeprefix(before), system[1]))
    tries = [talk[:1], talk[:3], talk] + ([[asked, *talk]] if found.system else [])
    return found if all(found.written(known) == _rendered(known, tokenizer) for known in tries) and one else None


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    return render(row_of(Chat(), "?", "-"), Chat(), tokenizer).end


def _rendered(talk: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": role, "content": text} for role, text in (*talk, ("assistant", MARK.format("end")))]
    return render(Row({"messages": messages}, "talk", 1), Chat(), tokenizer).prompt


def _cut(text: str, talk: list[tuple[str, str]]) -> list[str] | None:
    """The text between the messages, if each stands in it once, in their order."""
    return re.split("|".join(part for _, part in talk), text) if all(text.count(p) == 1 for _, p in talk) else None


def _common_end(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return a[len(a) - length :]


def _prompt(template: AnyTemplate, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The run's prompt around a line; None where the line is not there once."""
    mark = MARK.format("line")
    try:
        cut = render(row_of(template, mark, "-"), template, tokenizer).prompt.split(mark)
    except DataError:
        return None
    return "{{ .Prompt }}".join(cut) if len(cut) == 2 and "{{" not in "".join(cut) else None


def _stops(template: AnyTemplate, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What ends an answer: the end token, and what a chat template ends it with."""
    ends = [str(tokenizer.eos_token or "")]
    if isinstance(template, Chat):
        with contextlib.suppress(DataError):
            ends.append(_end(tokenizer).strip())
    return list(dict.fromkeys(end for end in ends if end))


def _starts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer, and so the file, puts the start token in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


def _sayable(text: str) -> bool:
    """Whether nothing in it ends what it stands in."""
    return '"""' not in text and not re.search(r"\{\{(?! (\.|range|if|else|end))", text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'
