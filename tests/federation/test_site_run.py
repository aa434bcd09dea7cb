"""What a site does with a run before a frame is answered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_folder, tiny_rows, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, MixtralConfig

from thinwire import assemble, config
from thinwire.federation.asked import Refused
from thinwire.federation.policy import Policy
from thinwire.federation.site_run import Visits, run_settings
from thinwire.federation.spent import Spent
from thinwire.federation.worker import Site
from thinwire.keys import Key
from thinwire.model.errors import ModelError
from thinwire.privacy.accountant import epsilon
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import VersionStore
from thinwire.wire import decode, encode

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


def test_a_site_adds_its_own_noise_and_counts_its_answers(place: Path, tmp_path: Path) -> None:
    """Two rounds are what the budget allows: a server that asks for a third in one run gets none."""
    noise, steps = 1.0, 3
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(12, 1))
    most = epsilon(noise, 4 / 12, 2 * steps, 1e-2)
    run = config.parse(
        {
            "rounds": 2,
            "model": {"path": str(place / "llama")},
            "data": {"path": "absent.jsonl", "template": "plain", "max_length": 128, "heldout": 0},
            "method": {"name": "fedkseed", "seeds": 64, "lr": 2e-4, "eps": 1e-3, "steps": steps, "batch_size": 4},
            "privacy": {"level": "record", "epsilon": 1.01 * most, "delta": 1e-2, "noise": noise},
        }
    )
    site = Site("north", str(tmp_path / "rows.jsonl"), str(tmp_path), "", model=str(place / "llama"))
    spent = Spent(tmp_path)
    visits = Visits(site, Policy(), run_settings(run, ("north",), "0" * 16), tmp_path, spent)
    visits.load()
    visits.read()
    method = visits.settings.method
    seats = Seats(visits.key, run.rounds, visits.net, VersionStore(tmp_path / "server"))
    state = method.init(seats.server(0))

    def asked(round: int, counted: int) -> Any:
        down = method.broadcast(state, seats.server(round), 0, None)
        frame = encode(down, run=visits.run, round=round, client=0)
        up = decode(method.Up, visits.answer("train", frame, counted))
        spent.add(visits.name, "train", round)
        return up

    first, again = asked(1, 0), asked(1, 0)
    assert first.examples == again.examples == 1
    assert math.isnan(first.loss)
    assert not torch.equal(first.scalars, again.scalars)  # the same question, answered with noise of its own
    with pytest.raises(Refused, match=r"another answer would spend more than the run's privacy\.epsilon"):
        asked(2, 1)


def test_a_site_has_the_references_that_one_process_has(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}", "chosen": f"yes {i}" * (i % 3 + 1), "rejected": "never"} for i in range(11)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": f"{tmp_path}/rows.jsonl", "clients": 1, "heldout": 0, "template": "chat", "loss": "dpo"}
    run = config.parse({"model": {"path": f"{place}/llama"}, "data": data, "method": {"name": "fedavg"}})
    site = Site("north", data["path"], str(tmp_path), "", model=str(place / "llama"))
    visits = Visits(site, Policy(), run_settings(run, ("north",), "0" * 16), tmp_path, Spent(tmp_path))
    visits.load()
    visits.read()
    net = assemble.net_of(run)
    (here,) = assemble.clients_data(run, assemble.rows_of(run.data, Key.root(0)), net)
    assert visits.data is not None
    assert {e.text: e.reference for e in visits.data.examples} == {e.text: e.reference for e in here.examples}
    assert len({e.reference for e in here.examples}) > 8
