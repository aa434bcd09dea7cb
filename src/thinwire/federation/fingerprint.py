"""What a server and its sites must have in common, as hashes: start model, tokenizer, prompt template, frame format."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from thinwire.config import Run
from thinwire.data import templates
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.model.numbers import digest
from thinwire.wire.frame import MAGIC

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from thinwire.model.net import Net

PROBE = "The quick brown fox, 1234567890 -- naïve café\n\t<s></s> 你好"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]
NAMES = {
    "base": "base model",
    "tokenizer": "tokenizer",
    "prompt": "prompt template",
    "format": "format of frames",
}


def fingerprints(run: Run, net: Net) -> dict[str, str]:
    """Name -> hash (16 hex digits); take it of a net whose weights are as they were loaded."""
    return {
        "base": digest(net),
        "tokenizer": _tokenizer(net.tokenizer),
        "prompt": _prompt(run, net.tokenizer),
        "format": MAGIC.hex(),
    }


def difference(mine: dict[str, str], theirs: dict[str, str]) -> str | None:
    """What the first difference is, in one line; None if there is none."""
    for name, what in NAMES.items():
        if mine[name] != theirs.get(name):
            return f"{what}: the server's is {theirs.get(name)}, this site's {mine[name]}"
    return None


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    parts: list[Any] = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.encode(PROBE)]
    parts.append({name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())})
    if tokenizer.is_fast:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        # not its padding and truncation, which a use of it changes
        parts += [whole.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "added_tokens")]
        parts.append(whole.get("model", {}).get("merges"))
    return _hash(parts)


def _prompt(run: Run, tokenizer: PreTrainedTokenizerBase) -> str:
    shown = {"template", "prompt", "answer", "choices", "words", "max_length", "too_long", "rejected", "beta", "scale"}
    data = run.data.model_dump(include=shown)
    text = "" if run.data.prompt is not None else repr(templates.named(run.data.template))
    parts = [data, text, tokenizer.chat_template]
    if run.data.prompt is None and run.data.template == "chat":
        # what it writes, too: with another version of what renders it, or another clock, that is something else
        parts += [_written(TALK[start:], tokenizer) for start in (0, 1)]
    return _hash(parts)


def _written(talk: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return repr(templates.render(Row({"messages": talk}, "talk", 1), templates.Chat(), tokenizer))
    except DataError as error:  # not every template takes a system message
        return str(error)


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, default=str).encode()).hexdigest()[:16]
