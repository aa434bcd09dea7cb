"""Encoders whose texts are vectors: the mean over the tokens, of length 1. And the files by which others pool so too.

A pooler, which some encoders have behind their layers, has no part in such a vector: it stays as it is.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinwire.model.errors import ModelError
from thinwire.model.folder import shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POOLER = "pooler."
MODULES, POOLING, LENGTHS = "modules.json", "1_Pooling", "sentence_bert_config.json"  # of sentence-transformers
MODE = "pooling_mode_"
KINDS = ("Transformer", "Pooling", "Normalize")


def is_embedder(model: PreTrainedModel) -> bool:
    """Whether the model has no head: it gives each position's vector."""
    return getattr(model, "base_model", None) is model


def settle(model: Any, folder: Path | None = None) -> None:
    """Have no pooler trained, nor be there at all where the files in the folder have none; in place."""
    if getattr(model, "pooler", None) is None:
        return
    if folder is not None and not _holds_pooler(folder):
        model.pooler = None
        return
    model.pooler.requires_grad_(False)


def check_pooling(folder: Path) -> None:
    """Raise ModelError for a folder of sentence-transformers' whose vectors are other than means."""
    if not (folder / MODULES).is_file():
        return
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        kinds = {str(each["type"]).rpartition(".")[2]: str(each["path"]) for each in modules}
        pooling = json.loads((folder / kinds.get("Pooling", POOLING) / "config.json").read_text(encoding="utf-8"))
        found = pooling.get("pooling_mode") or [name for name, on in pooling.items() if on is True and MODE in name]
        modes = {re.sub(rf"{MODE}|_tokens?$", "", name) for name in ([found] if isinstance(found, str) else found)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read how the model in {folder} pools: {error}") from None
    if modes != {"mean"} or not set(kinds) <= set(KINDS):
        how = ", ".join(sorted(modes | set(kinds) - set(KINDS)))
        raise ModelError(f'data.loss: "contrastive" takes the mean over tokens, and the model in {folder} has {how}')


def describe(model: PreTrainedModel, start: Path, folder: Path) -> None:
    """Add what sentence-transformers reads to a model's folder; as long a text as the `start` folder says, if it does.

    Nothing where the model has a head.
    """
    if not is_embedder(model):
        return
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(("", POOLING, "2_Normalize"), KINDS, strict=True))
    ]
    pooling = {"word_embedding_dimension": model.config.hidden_size, "pooling_mode_mean_tokens": True}
    others = ("cls_token", "max_tokens", "mean_sqrt_len_tokens")
    (folder / POOLING).mkdir()
    (folder / POOLING / "config.json").write_text(_json(pooling | {f"pooling_mode_{name}": False for name in others}))
    (folder / "2_Normalize").mkdir()
    (folder / MODULES).write_text(_json(modules))
    if (start / LENGTHS).is_file():
        shutil.copyfile(start / LENGTHS, folder / LENGTHS)


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=2) + "\n"


def _holds_pooler(folder: Path) -> bool:
    from safetensors import safe_open

    for shard in shards(folder):
        with safe_open(folder / shard, framework="pt") as opened:
            if any(POOLER in name for name in opened.keys()):  # noqa: SIM118 - it is no dict
                return True
    return False
