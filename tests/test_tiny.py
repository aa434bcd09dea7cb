"""The tests' own support: a tokenizer that loses nothing, a model that repeats, a folder that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHOICES, VOCABULARY, tiny_folder, tiny_model, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENIZER = tiny_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert bytes(tokens) == text.encode()
    assert TOKENIZER.decode(tokens) == text


def test_the_model_repeats_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    models = [tiny_model(0), tiny_model(0), tiny_model(1)]
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [model.get_input_embeddings().weight for model in models]
    assert weights[0].shape == (VOCABULARY, 32)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert tiny_model(num_hidden_layers=1).config.num_hidden_layers == 1


@pytest.mark.filterwarnings("ignore")
def test_the_folder_loads(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", seed=3)
    loaded, made = AutoModelForCausalLM.from_pretrained(folder), tiny_model(3)
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), made.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("é <eos>")["input_ids"] == TOKENIZER("é <eos>")["input_ids"]
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


def test_rows() -> None:
    assert tiny_rows(9) == tiny_rows(9) != tiny_rows(9, seed=1)
    assert {row.fields["task"] for row in tiny_rows(9)} == {"copy", "first", "upper"}
    assert {row.fields["output"] for row in tiny_rows(20, closed=True)} == set(CHOICES)
