"""Things small enough for every test: a byte tokenizer, a random model, synthetic rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thinwire.data.rows import Row

BOS, EOS, PAD = 256, 257, 258  # a byte's token is the byte itself
VOCABULARY = 259
CHOICES = ("great", "terrible")
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "kelp", "maple", "pebble")
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A token a byte, and <bos>, <eos>, <pad>; with `bos` it puts <bos> in front by default."""
    # The byte-level scheme writes a byte as the character of that number where it is printable; the others
    # take the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def merging_tokenizer(
    split: pre_tokenizers.PreTokenizer | None = None, *, bos: bool = False
) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with one token more, "th", text split before it as GPT-2's is, or by `split`."""
    plain = tiny_tokenizer(bos=bos)
    whole = json.loads(plain.backend_tokenizer.to_str())
    whole["model"]["vocab"] |= {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "th": VOCABULARY}
    whole["model"]["merges"] = [["t", "h"]]
    core = Tokenizer.from_str(json.dumps(whole))
    core.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama of about 27,000 float32 weights, in eval mode; `overrides` are fields of LlamaConfig."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    config = LlamaConfig(**(fields | overrides))
    # Only the CPU generator is used, so only it is seeded, and put back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.float32).eval()


def tiny_folder(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """The tiny model and its tokenizer saved as a Hugging Face folder."""
    tiny_model(seed, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return Path(path)


def tiny_encoder(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random BERT without a head, of 4 layers, and a tokenizer that puts <bos> and <eos> around, as a folder."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        BertModel(BertConfig(**(fields | overrides))).save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer.save_pretrained(path)
    return Path(path)


def tiny_rows(n: int, seed: int = 0, *, closed: bool = False) -> list[Row]:
    """Rows that can be learnt: instruction, input, output and `task`, in turn copy, first and upper.

    With `closed` the output is one of CHOICES, distinguished by one word of the input, and `task` is north or south.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for i in range(n):
        words = [str(word) for word in generator.choice(WORDS, size=3)]
        if closed:
            output, task = CHOICES[int(generator.integers(2))], ("north", "south")[i % 2]
            words[int(generator.integers(3))] = {"great": "splendid", "terrible": "dreadful"}[output]
            fields = {
                "instruction": "Say great or terrible.",
                "input": " ".join(words),
                "output": output,
                "task": task,
            }
        else:
            task = ("copy", "first", "upper")[i % 3]
            output = {"copy": " ".join(words), "first": words[0], "upper": " ".join(words).upper()}[task]
            fields = {"instruction": f"Do {task}.", "input": " ".join(words), "output": output, "task": task}
        rows.append(Row(fields, "tiny.jsonl", i + 1))
    return rows


def write_jsonl(path: Path, rows: Iterable[Row]) -> Path:
    """The rows as a file that `read_jsonl` reads back."""
    path.write_text("".join(json.dumps(dict(row.fields)) + "\n" for row in rows), encoding="utf-8")
    return path
