"""What a GGUF file states of a model, made from its config: the way back of `metadata`.

And what is held against it once the file has been read again: a config has more than a file has fields for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from thinwire.model.errors import ModelError
from thinwire.model.metadata import FIELDS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

# The architecture in the file, by the config's model_type: those whose layout `gguf_file` can undo.
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "starcoder2": "starcoder2",
}
RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
# in configs, and nothing that a causal model computes depends on it: names, training, generation, where it is from
ASIDE = {
    "_name_or_path", "_model_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "embd_pdrop", "eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
    "max_window_layers", "model_type", "n_inner", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    "n_ctx", "feed_forward_length", "original_max_position_embeddings",
}  # fmt: skip
SCALED = ("default", "linear", "yarn", "llama3")  # how positions may be scaled


def settings(config: PreTrainedConfig, kind: str) -> dict[str, Any]:
    """Field after the architecture's name -> value; ModelError where positions are scaled as no field says."""
    known: Any = config
    found: dict[str, Any] = {}
    for name, places in FIELDS.items():
        if name.startswith(("ssm.", "expert")) or name == (LAYER if hasattr(known, "rms_norm_eps") else RMS):
            continue
        value = next((getattr(known, place) for place in places if hasattr(known, place)), None)
        if value is not None:
            found[name] = value
    head = found.get("attention.key_length") or known.hidden_size // known.num_attention_heads
    found |= {"attention.key_length": head, "attention.value_length": head}
    found.setdefault("feed_forward_length", 4 * known.hidden_size)  # GPT-2's, where its config leaves it open
    if kind in ("gemma2", "gemma3", "phi3") and getattr(known, "sliding_window", None):
        found["attention.sliding_window"] = known.sliding_window
    whole = getattr(known, "rope_parameters", None)
    return found | (_positions(whole, head, known) if whole else {})


def _positions(whole: Mapping[str, Any], head: int, config: Any) -> dict[str, Any]:
    rope = whole.get("full_attention", whole)
    found = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
    }
    if "sliding_attention" in whole:
        found["rope.freq_base_swa"] = float(whole["sliding_attention"]["rope_theta"])
    how = rope.get("rope_type", "default")
    if how not in SCALED:
        raise ModelError(f"GGUF: positions scaled as {how} cannot be written; known are {', '.join(SCALED)}")
    if how in ("linear", "yarn"):
        found |= {"rope.scaling.type": how, "rope.scaling.factor": float(rope["factor"])}
    if how == "yarn":
        found["rope.scaling.original_context_length"] = rope.get(
            "original_max_position_embeddings", config.max_position_embeddings
        )
    return found


def divisors(model: PreTrainedModel) -> Tensor | None:
    """What Llama 3 divides its frequencies by, which a file holds as the tensor rope_freqs.weight."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    own: Any = model.base_model
    turned: Tensor = own.rotary_emb.inv_freq.float().cpu()
    width = 2 * len(turned)
    plain: Tensor = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    return plain / turned


def lost(model: PreTrainedModel, again: PreTrainedModel) -> str | None:
    """What the model that was read from the file computes by another setting, if anything: name and value."""
    own, its = (_flat(one.config.to_dict()) for one in (model, again))
    for name, value in own.items():
        known = its.get(name)
        if name in ASIDE or name.startswith("rope_") or name.endswith(("_dropout", "_pdrop", "dropout")):
            continue
        if name not in its and (not value or (name == "sliding_window" and value >= own["max_position_embeddings"])):
            continue
        if name in its and (known == value or (isinstance(value, float) and _close(known, value))):
            continue
        return f"{name} = {value!r}"
    for name, turned in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            there = dict(again.named_buffers()).get(name)
            if there is None or not torch.allclose(turned.float().cpu(), there.float().cpu(), rtol=1e-4):
                return f"positions ({name})"
    scales = [getattr(getattr(one.base_model, "rotary_emb", None), "attention_scaling", 1.0) for one in (model, again)]
    if not all(isinstance(scale, float | int) and math.isclose(scale, scales[0], rel_tol=1e-4) for scale in scales):
        return "the scale of attention with positions"
    return None


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not isinstance(value, dict)}


def _close(there: Any, value: float) -> bool:
    return isinstance(there, float | int) and math.isclose(there, value, rel_tol=1e-6)
