"""Every method on tiny random models of several architectures, tied and untied, with grouped-query attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation
from tiny import BOS, EOS, PAD, VOCABULARY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from thinwire.core import Method
from thinwire.evaluate.loss import mean_loss
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.methods.fedex import FedEx
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedzo import FedZO
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.methods.slora import SLora
from thinwire.model.net import Net
from thinwire.model.views import Full, Lora, View

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
# name -> (transformers' model type, its config, the layers beside which LoRA's factors go)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True, **GROUPED}, ("q_proj", "v_proj")),
    "llama-untied": ("llama", {"tie_word_embeddings": False}, ("q_proj", "v_proj")),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2}, ("q_proj", "v_proj")),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, **GROUPED}, ("q_proj", "v_proj")),
    "gemma3": ("gemma3_text", {"sliding_window": 8, **GROUPED}, ("q_proj", "v_proj")),
    "gpt2": ("gpt2", {}, ("c_attn",)),
    "gpt-neox": ("gpt_neox", {"tie_word_embeddings": False}, ("query_key_value",)),
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
LOCAL: dict[str, Any] = {"lr": 3e-3, "steps": 3, "batch_size": 4}
PROBES: dict[str, Any] = {"lr": 1e-4, "eps": 1e-3, "steps": 4, "batch_size": 4, "seeds": 16}
BLOCKS: dict[str, Any] = {"blocks": 3, "drop": 0.34, "spared": (0, 0)}
METHODS: dict[str, Method] = {
    "fedavg": FedAvg(**LOCAL),
    "fedit": FedAvg(**(LOCAL | {"lr": 1e-2})),
    "fedex": FedEx(**(LOCAL | {"lr": 1e-2})),
    "slora": SLora(**(LOCAL | {"lr": 1e-2})),
    "fedkseed": FedKSeed(**PROBES),
    "fedkseed-lowrank": FedKSeed(**PROBES, law="lowrank", queries=2, together=True),
    "fedzo": FedZO(**PROBES),
    "gradualdiff": GradualDiff(**LOCAL),
    "fedcybgd": FedCyBGD(**LOCAL, **BLOCKS, prune=0.5),
}
ON_FACTORS = {"fedit", "fedex", "slora"}
CANNOT_NARROW = {"gpt-neox"}  # query, key and value lie in one another: layers are dropped, or kept whole


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture, and a folder with a model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, fields, _ = ARCHITECTURES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | fields))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_trains_an_architecture(name: str, made: tuple[str, Path], tmp_path: Path) -> None:
    """Two rounds without an error, a lower loss, and an export that transformers loads and that gives the same."""
    architecture, folder = made
    method = METHODS[name]
    view: View = Full()
    if name in ON_FACTORS:
        targets = ARCHITECTURES[architecture][2]
        view = Lora(rank=4, alpha=8.0, targets=tuple(targets))
    if name == "fedcybgd" and architecture in CANNOT_NARROW:
        method = FedCyBGD(**LOCAL, **BLOCKS, prune=0.0)
    net = Net.open(str(folder), remember=True, view=view)
    federation = Federation(method, net, tmp_path, rounds=2, sizes=(12, 12))
    method.materialise(federation.state, net)
    before = sum(mean_loss(net.model, data, 12)[0] for data in federation.data)
    federation.run()
    assert not [visit.error for at in federation.history for visit in at.visits.values() if visit.error]
    method.materialise(federation.state, net)
    after = sum(mean_loss(net.model, data, 12)[0] for data in federation.data)
    assert after < before - 1e-3
    net.save(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = net.model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    tied = ARCHITECTURES[architecture][1].get("tie_word_embeddings", architecture in ("gemma3", "gpt2"))
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) == tied
