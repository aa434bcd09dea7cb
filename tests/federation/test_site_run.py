"""What a site does with a run before a frame is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import VOCABULARY, tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig

from thinwire import assemble, config
from thinwire.federation.policy import Policy
from thinwire.federation.site_run import Visits, run_settings
from thinwire.federation.spent import Spent
from thinwire.federation.worker import Site
from thinwire.model.errors import ModelError

EXPERTS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two models: llama, and experts that own parameters and modules."""
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(folder / "llama")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **EXPERTS)).save_pretrained(folder / "experts")
    tiny_tokenizer().save_pretrained(folder / "experts")
    return folder


@pytest.mark.parametrize(
    ("model", "method", "line"),
    [
        ("experts", {"name": "fedkseed", "together": True}, r"method\.together: fedkseed with together = true cannot"),
        ("experts", {"name": "fedzo", "together": True}, r"method\.together: fedzo with together = true cannot"),
        ("llama", {"name": "fedcybgd", "blocks": 9}, r"method\.blocks: 2 layers cannot make 9 blocks"),
        ("llama", {"name": "cgfed"}, r"model\.lora: missing; cgfed codes the factors of a LoRA view"),
        ("llama with factors", {"name": "fedcybgd", "blocks": 2}, r"model\.lora: .*fedcybgd"),
    ],
)
def test_what_does_not_fit_is_refused_as_the_net_is_opened_at_either_side(
    place: Path, tmp_path: Path, model: str, method: dict[str, Any], line: str
) -> None:
    kind = model.removesuffix(" with factors")
    table = {"path": str(place / kind), **({} if kind == model else {"lora": {"rank": 2}})}
    run = config.parse({"model": table, "data": {"path": "absent.jsonl"}, "method": method})
    with pytest.raises(ModelError, match=f"^{line}"):
        assemble.net_of(run, remember=True)
    site = Site("north", "absent.jsonl", str(tmp_path), "", model=str(place / kind))
    visits = Visits(site, Policy(), run_settings(run, ("north",), "0" * 16), tmp_path, Spent(tmp_path))
    with pytest.raises(ModelError, match=f"^{line}") as caught:
        visits.load()
    assert "\n" not in str(caught.value)
