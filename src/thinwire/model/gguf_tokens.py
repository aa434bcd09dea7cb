"""A tokenizer as a GGUF file has it: tokens by number, their types, merges, and by which name text is split first."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from thinwire.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, OWN, UNUSED, BYTE = range(1, 7)  # types of tokens: gguf.TokenType
FIRST = ("llama-bpe", "tekken", "qwen2", "qwen35", "gpt-4o")  # of several names of one split, the one to write


def write(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Put the tokenizer into a GGUFWriter, with a token for each of `rows` rows of the embedding.

    ModelError: it is none of byte-level BPE, or BPE with bytes to fall back on, or splits text as no name says.
    """
    if not tokenizer.is_fast:
        raise ModelError("GGUF: the tokenizer has no tokenizer.json, and only those can be written")
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise ModelError(f"GGUF: a tokenizer of the kind {model['type']} cannot be written, only BPE")
    spelled = {number: token for token, number in tokenizer.get_vocab().items()}
    count = max(rows, len(spelled))
    tokens = [spelled.get(number, f"[PAD{number}]") for number in range(count)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise ModelError("GGUF: a tokenizer that merges nothing cannot be written")
    pieces = bool(model.get("byte_fallback"))
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_puts_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(whole["pre_tokenizer"]))
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_types(_types(whole, tokens, spelled, tokenizer.unk_token_id, pieces))
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    plain = tokenizer.encode("a", add_special_tokens=False)
    around = tokenizer.encode("a")
    writer.add_add_bos_token(around[: len(around) - len(plain)][:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(around[len(plain) :][-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _types(whole: Any, tokens: list[str], spelled: dict[int, str], unknown: int | None, pieces: bool) -> list[int]:
    kinds = [NORMAL if number in spelled else UNUSED for number in range(len(tokens))]
    if pieces:
        kinds = [BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else kinds[i] for i, token in enumerate(tokens)]
    for added in whole["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else OWN
    if pieces and unknown is not None:
        kinds[unknown] = UNKNOWN
    return kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Better for what is merged earlier: llama.cpp merges the pair whose result scores highest."""
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault(merge.replace(" ", ""), len(rank))
    return [float(-rank.get(token, len(merges))) for token in tokens]


def _puts_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text gets a space in front."""
    return str(tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[0]).startswith("\u2581")


def _split(step: Any) -> str:
    """llama.cpp's name for how text is cut before it is merged."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step] if step else []
    kinds = [one["type"] for one in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[0]["invert"]:
            pattern = steps[0]["pattern"].get("Regex")
            known = _named()
            for name in FIRST:
                if known.get(name) == pattern:
                    return name
    raise ModelError("GGUF: the tokenizer splits text in a way that llama.cpp has no name for, so it cannot be written")


def _named() -> dict[str, str]:
    """Of transformers: how text is split under a name."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # an earlier version, which reads no such names
        return {}
    return dict(GGUF_PRE_TOKENIZER_SPLITS)
