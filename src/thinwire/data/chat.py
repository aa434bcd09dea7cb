"""What a tokenizer's chat template writes of a talk: the prompt, the answer, and the end of the answer's turn.

All three are cut out of the template's own rendering of the whole talk, the answer in it. Its generation prompt is not
taken: many templates write something else before an answer (a closed thought, a channel, a space), or have none. Where
the answer stands is found by rendering the talk once more with a mark in its place; only where the answer is more
than a text (a thought, a call of a tool) the generation prompt shows where it begins.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from thinwire.data.errors import DataError
from thinwire.data.rendering import Message, write
from thinwire.data.rows import Row, kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ue000\ue001\ue002"  # stands for the answer: no letters that a template may change, no space that it may cut
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
CONTENTS = (*THOUGHTS, "content", "tool_calls", "function_call")  # what a message holds; its other keys are about it
TEXTS = (None, "text", "input_text", "output_text")  # types of a part of a content that are text


@dataclass(frozen=True)
class Turn:
    """`prompt` + `answer` + `end` is how the rendering begins; where `end` holds no token of its own, eos follows.

    `notes`: lines about what the template does that people may not expect.
    """

    prompt: str
    answer: str
    end: str
    notes: tuple[str, ...] = ()


def turn(row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Turn:
    """The last message as the template writes it, and what stands before it; DataError where it does not write it."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template (other templates: alpaca, plain, completion)")
    tools = _tools(row)
    seen: dict[str, None] = {}
    written = functools.partial(write, row, tokenizer, seen=seen, tools=tools)
    *talk, last = messages
    about = {key: value for key, value in last.items() if key not in CONTENTS}
    marked, whole = written([*talk, {**about, "content": MARK}]), written(messages)
    if (times := marked.count(MARK)) != 1:
        raise row.error(f"the tokenizer's chat template writes the assistant's answer {times} times, not once")
    before, after = marked.split(MARK)
    stop = max(len(before), len(whole) - len(after))
    content = last.get("content", "")
    if whole.startswith(before) and whole[stop:] == after and _same(whole[len(before) : stop], content):
        start = len(before)
    else:
        start, stop = _spoken(whole, before, after, _header(row, talk, tokenizer, tools), tokenizer)
    answer = whole[start:stop]
    if _bare(content) not in _bare(answer):
        raise row.error(
            f"the tokenizer's chat template writes the answer {_short(content)} as {_short(answer)}; "
            "data.prompt and data.answer of your own take it as it is"
        )
    if not answer.strip():
        raise row.error("the tokenizer's chat template writes nothing of the answer")
    end = _end(whole[stop:], tokenizer)
    notes = [*seen, *_lost(talk, last, whole, answer)]
    if tools and whole == write(row, tokenizer, messages, seen=seen):
        notes.append("the chat template leaves out the tools of the rows")
    return Turn(whole[:start], answer, end, tuple(notes))


def remarks(
    row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, ends: Collection[str]
) -> list[str]:
    """What a template does that holds for all rows: another generation prompt, another end, no beginning."""
    found = turn(row, messages, tokenizer)
    lines = []
    header = generation_prompt(row, messages, tokenizer) or found.prompt
    if header.rstrip() != found.prompt.rstrip():
        shared = common(header, found.prompt)
        lines.append(
            f"the chat template's generation prompt is not what it writes before an answer ({_short(header[shared:])}, "
            f"and not {_short(found.prompt[shared:])}): what is read and trained is what it writes"
        )
    eos = tokenizer.eos_token
    for end in sorted(ends):
        if end and not stops(tokenizer, [end])[0]:
            lines.append(
                f"the chat template ends an answer with the text {_short(end)}, which is no token of its own: the "
                f"tokenizer's end token {_short(eos or '')} is trained behind it"
            )
        elif end and (eos is None or eos not in end):
            lines.append(
                f"answers end as the chat template has it, with {_short(end)}, not with the tokenizer's end token "
                f"{_short(eos or '')}: whoever serves the model has to stop there"
            )
    bos = tokenizer.bos_token_id
    first = list(tokenizer("a")["input_ids"])[:1]
    begun = list(tokenizer(found.prompt, add_special_tokens=False)["input_ids"])[:1]
    if first == [bos] and begun != [bos]:
        lines.append(
            f"the chat template does not begin with {_short(str(tokenizer.bos_token))}, which the tokenizer puts "
            "before a text: it stands before the prompts"
        )
    return lines


def generation_prompt(row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes before an answer that is yet to come; empty where it takes no talk without its end."""
    with contextlib.suppress(DataError):
        return write(row, tokenizer, messages[:-1], tools=_tools(row), header=True)
    return ""


def stops(tokenizer: PreTrainedTokenizerBase, ends: Collection[str]) -> tuple[set[int], tuple[str, ...]]:
    """Where an answer is over: the tokens of the ends, and the ends that have no token of their own."""
    tokens, texts = set[int](), list[str]()
    for end in sorted(ends):
        named = _names(tokenizer).findall(end)
        for name in (name for run in named for name in _apart(run, tokenizer)):
            tokens.add(cast(int, tokenizer.convert_tokens_to_ids(name)))  # a list for a list, a number for a name
        if end and not named:
            texts.append(end)
    return tokens, tuple(texts)


def messages_of(row: Row) -> list[Message]:
    """The column `messages`, without nulls, contents as text; DataError where the last is not the assistant's.

    A message may hold any keys that the template knows. Contents in parts are joined, line by line, where all are text.
    """
    value = row.value("messages")
    if not isinstance(value, list) or len(value) < 2:
        raise row.error("field 'messages' is not a list of at least two messages")
    messages = []
    for i, raw in enumerate(value, 1):
        message = {key: part for key, part in raw.items() if part is not None} if isinstance(raw, Mapping) else {}
        full = any(message.get(key) for key in CONTENTS if key != "content")
        if not isinstance(message.get("role"), str) or ("content" not in raw and not full):
            raise row.error(f"message {i} is not an object with 'role' and 'content'")
        if "content" in message or not full:
            message["content"] = _text(row, raw["content"], f"the content of message {i}")
        messages.append(message)
    if messages[-1]["role"] != "assistant":
        raise row.error(f"the last message is from '{messages[-1]['role']}', not from the assistant")
    return messages


def _tools(row: Row) -> list[Any] | None:
    """The tools that a row of messages names, which tables without lists hold as JSON; None where it names none."""
    if row.answer_column() != "messages" or not row.has("tools"):
        return None
    value = row.value("tools")
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise row.error("field 'tools' is not a list")
    return value


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long the beginning is that two texts, or lists of tokens, have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _text(row: Row, content: Any, name: str) -> str:
    if not isinstance(content, list):
        return row.as_text(content, name)
    texts = []
    for i, part in enumerate(content, 1):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in TEXTS else part
        if not isinstance(text, str):
            what = f"of type {part['type']!r}" if isinstance(part, Mapping) and "type" in part else kind(part)
            raise row.error(f"part {i} of {name} is {what}, not text")
        texts.append(row.as_text(text, f"part {i} of {name}"))
    return "\n".join(texts)


def _header(
    row: Row, talk: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None
) -> str | None:
    """The generation prompt behind a talk; None where the template has none, or does not take a talk without an end."""
    with contextlib.suppress(DataError):
        header = write(row, tokenizer, talk, tools=tools, header=True)
        return header if header != write(row, tokenizer, talk, tools=tools) else None
    return None


def _spoken(
    whole: str, before: str, after: str, header: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Where in the rendering an answer begins and stops that is more than a text."""
    start = common(whole, before)
    if start < len(before) and header is not None and whole.startswith(header):
        start = len(header)
    stop = len(whole) - len(after)
    if stop < start or whole[stop:] != after:
        closed = re.search(rf"(?:{_names(tokenizer).pattern})\s*$", whole[start:])
        stop = start + closed.start() if closed else len(whole)
    return start, stop


def _end(after: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what stands after an answer, all up to its first special tokens; without any the text, without its space."""
    found = _names(tokenizer).search(after)
    return after[: found.end()] if found else after.rstrip()


@functools.lru_cache(maxsize=4)
def _names(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Special and added tokens, one or several without anything between."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
    longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})+")


def _apart(run: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return re.findall(_names(tokenizer).pattern.removesuffix("+"), run)


def _lost(talk: Sequence[Message], last: Message, whole: str, answer: str) -> Iterator[str]:
    """A line for each kind of thing that the template leaves out."""
    bare = None
    for message in talk:
        content = message.get("content", "")
        if message["role"] == "assistant":  # templates that know of thoughts leave out those of earlier turns
            content = content.rpartition("</think>")[2]
        if content.strip() not in whole:
            bare = bare or _bare(whole)
            if _bare(content) not in bare:
                yield f"the chat template leaves out or changes the text of the role '{message['role']}'"
    thought = next((text for key in THOUGHTS if isinstance(text := last.get(key), str)), "")
    if _bare(thought) not in _bare(answer):
        yield "the chat template leaves out the thought of the answer"
    for call in last.get("tool_calls") or ():
        about = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(about, Mapping) and str(about.get("name", "")) not in answer:
            yield "the chat template leaves out the answer's calls of tools"


def _bare(text: str) -> str:
    return "".join(text.split())


def _same(one: str, other: str) -> bool:
    """Whether the texts are the same but for space."""
    return one == other or _bare(one) == _bare(other)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:20]}...{text[-17:]}")
