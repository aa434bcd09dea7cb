"""What a GGUF file states of its model, held against the config that transformers reads from it.

That reader takes a few fields of each architecture and leaves the rest aside without a word: how positions are scaled,
windows, caps, the size of heads. What it leaves is put into the config here, or the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thinwire.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What the field of that name, after the architecture's, is called in configs; the first that a config has is meant.
FIELDS = {
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.time_step_rank": ("time_step_rank",),
}
# what changes nothing in what a model computes, or is dealt with by name below
ASIDE = ("rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "use_parallel_residual", "expert_gating_func")
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "attention.causal": bool,
    "logit_scale": lambda value: value == 1,
    "residual_scale": lambda value: value == 1,
    "embedding_scale": lambda value: value == 1,
    "expert_weights_scale": lambda value: value == 1,
}
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
OWN = ("qwen35", "qwen35moe", "lfm2", "gemma4")  # of these transformers reads what there is
WINDOWED = ("gemma2", "gemma3", "phi3", "gpt-oss")  # elsewhere llama.cpp pays no heed to a window
FACTORS = {"rope_freqs.weight": "freqs", "rope_factors_long.weight": "long", "rope_factors_short.weight": "short"}


def complete(
    config: PreTrainedConfig,
    fields: Mapping[str, Any],
    names: Iterable[str],
    factors: Mapping[str, list[float]],
    file: Path,
) -> None:
    """Put into the config what the file has and it lacks, in place.

    `fields` are all of the file's, `names` those of its tensors, `factors` its tensors of FACTORS. ModelError: a field
    that changes what the model computes has no place in the config.
    """
    kind = str(fields["general.architecture"])
    if kind in OWN:
        return
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")}
    left = {name: value for name, value in own.items() if name not in ASIDE}
    for name, places in FIELDS.items():
        place = next((place for place in places if hasattr(config, place)), None)
        if name in left and place is not None:
            setattr(config, place, _same(getattr(config, place), left.pop(name)))
    for place, bias in BIASES.items():
        if hasattr(config, place) and bias in {*names}:
            setattr(config, place, True)
    if left.get("attention.head_count_kv") == config.num_attention_heads:
        del left["attention.head_count_kv"]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("attention.key_length", "attention.value_length"):
        if left.get(name) == head:
            del left[name]
    _positions(
        config, {name: left.pop(name) for name in [*left] if name.startswith("rope.")}, factors, head, kind, file
    )
    _windows(config, left, kind)
    _scales(config, left, kind, head)
    for name, value in left.items():
        if not NEUTRAL.get(name, lambda value: not value)(value):
            raise ModelError(f"the GGUF file {file} sets {kind}.{name} = {value}, which transformers has no place for")


def check_tensors(names: Iterable[str], known: Iterable[str], file: Path) -> None:
    """Raise ModelError for a tensor of the file that no parameter of the model is made of."""
    known = {*known}
    left = sorted({*names} - known - {f"{name}.weight" for name in known} - {*FACTORS})  # experts' have no ending there
    if left:
        raise ModelError(
            f"the GGUF file {file} holds {left[0]} (of {len(left)}), which the model that transformers makes of it has "
            "no place for"
        )


def _same(there: Any, value: Any) -> Any:
    """The value, or what is there where it is only written more exactly: a file holds float32."""
    close = isinstance(there, float) and isinstance(value, float) and math.isclose(there, value, rel_tol=1e-6)
    return there if close else value


def _positions(
    config: Any, own: dict[str, Any], factors: Mapping[str, list[float]], head: int, kind: str, file: Path
) -> None:
    """What positions turn by: base, share of a head, scaling."""
    own = {name: value for name, value in own.items() if name not in ASIDE}
    whole = getattr(config, "rope_parameters", None)
    if not isinstance(whole, dict):
        if any(own.get(f"rope.{name}") for name in ("scaling.type", "scaling.factor")) or factors:
            raise ModelError(f"the GGUF file {file} scales positions, and {config.model_type} does not turn by them")
        return
    rope = whole.get("full_attention", whole)
    if (base := own.pop("rope.freq_base", None)) is not None:
        rope["rope_theta"] = base
    if (base := own.pop("rope.freq_base_swa", None)) is not None and "sliding_attention" in whole:
        whole["sliding_attention"]["rope_theta"] = base
    turned = own.pop("rope.dimension_count", head)
    if own.pop("rope.dimension_count_swa", turned) != turned:
        raise ModelError(
            f"the GGUF file {file} sets {kind}.rope.dimension_count_swa, which transformers has no place for"
        )
    if turned != int(head * rope.get("partial_rotary_factor", 1.0)):
        if "partial_rotary_factor" not in rope:
            raise ModelError(
                f"the GGUF file {file} sets {kind}.rope.dimension_count = {turned} of heads of {head}, and "
                f"{config.model_type} turns whole heads"
            )
        rope["partial_rotary_factor"] = turned / head
    context = int(config.max_position_embeddings)
    first = int(own.pop("rope.scaling.original_context_length", context))
    how, factor = own.pop("rope.scaling.type", None), float(own.pop("rope.scaling.factor", 1.0))
    attention = own.pop("rope.scaling.attn_factor", 1.0)
    old = own.pop("rope.scale_linear", 1.0)  # as files before 2024 have it
    if old != 1 and how is None:
        how, factor = "linear", float(old)
    if freqs := factors.get("freqs"):
        if any(not math.isclose(value, 1, rel_tol=1e-6) for value in freqs):
            rope.update(_llama3(config, rope, freqs) or _listed(freqs, freqs, context, 1.0))
    elif "long" in factors and "short" in factors:
        rope.update(_listed(factors["long"], factors["short"], first, float(attention)))
        config.original_max_position_embeddings = first
    elif how == "linear" and factor != 1:
        rope.update(rope_type="linear", factor=factor)
    elif how == "yarn" and factor != 1:
        rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=first)
        for theirs, ours in (("beta_fast", 32), ("beta_slow", 1)):
            rope[theirs] = float(own.pop(f"rope.scaling.yarn_{theirs}", ours))
        rope["attention_factor"] = float(attention) * (0.1 * math.log(factor) + 1)
        own = {name: value for name, value in own.items() if name != "rope.scaling.yarn_ext_factor" or value != 1}
    elif how not in (None, "none", "linear", "yarn", "longrope"):
        raise ModelError(f"the GGUF file {file} sets {kind}.rope.scaling.type = {how}, which is not known")
    for name, value in own.items():
        if value and value not in (1, -1):
            raise ModelError(f"the GGUF file {file} sets {kind}.{name} = {value}, which transformers has no place for")


def _listed(long: list[float], short: list[float], first: int, attention: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": first,
        "attention_factor": attention,
    }


def _llama3(config: Any, rope: dict[str, Any], freqs: list[float]) -> dict[str, Any] | None:
    """Llama 3's own scaling, if these are its factors: a file holds what it comes to."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = {
        "rope_type": "llama3",
        "factor": float(max(freqs)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    before = config.rope_parameters
    try:
        config.rope_parameters = rope | found
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    finally:
        config.rope_parameters = before
    width = 2 * len(freqs)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    same = len(scaled) == len(freqs) and torch.allclose(plain / scaled, torch.tensor(freqs), rtol=1e-4)
    return found if same else None


def _windows(config: Any, left: dict[str, Any], kind: str) -> None:
    """How far back layers see, and which of them."""
    window = left.pop("attention.sliding_window", None)
    if window and window < config.max_position_embeddings:
        if kind not in WINDOWED:
            left["attention.sliding_window"] = window  # refused
            return
        config.sliding_window = window
    pattern = left.pop("attention.sliding_window_pattern", None)
    if pattern and getattr(config, "layer_types", None) is not None:
        count = len(config.layer_types)
        if isinstance(pattern, int):
            pattern = [(layer + 1) % pattern != 0 for layer in range(count)]
        config.layer_types = ["sliding_attention" if sees else "full_attention" for sees in pattern[:count]]


def _scales(config: Any, left: dict[str, Any], kind: str, head: int) -> None:
    """What attention is scaled by."""
    if kind in ("gemma2", "gemma3"):
        # no field has it: llama.cpp knows the models of 27 billion weights by their layers
        largest = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[kind]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else head
    scale = left.pop("attention.scale", None)
    if scale and not math.isclose(scale, head**-0.5, rel_tol=1e-5):
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = scale**-2
        else:
            left["attention.scale"] = scale  # refused
