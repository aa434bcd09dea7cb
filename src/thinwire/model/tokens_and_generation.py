"""What transformers has made, settled: a pad token within the vocabulary, a generation config that can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinwire.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars nor advice from transformers and the hub client inside; what was on before is on again after."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def caching(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the config asks for the cache, which is off in training: who serves what is saved wants it."""
    config = model.config
    cached, config.use_cache = config.use_cache, True
    try:
        yield
    finally:
        config.use_cache = cached


def settle_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # The embeddings are never resized for a pad token: the export would no longer fit the model it came from.
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= rows:
            end = f"; its end token {tokenizer.eos_token!r} is number {tokenizer.eos_token_id}"
            raise ModelError(
                f"the tokenizer in {folder} has neither a pad nor an end token within the {rows} rows of the model's "
                f"embedding{end if tokenizer.eos_token_id is not None else ''}"
            )
        tokenizer.pad_token = tokenizer.eos_token


def settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model a generation config that names its end and pad tokens and that can be saved."""
    from transformers import GenerationConfig

    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        # Sampling fields without sampling, and the like: transformers refuses to save them once anything has
        # changed.
        config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        model.generation_config = config
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
