"""Two adapters of one base made one: the mean of their products, to rounding, in the model and for peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused, thinwire
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire.model.load import load

LAYERS = ["q_proj", "down_proj"]
VIEWS: dict[str, dict[str, Any]] = {
    "one": {"kind": "lora", "rank": 2, "alpha": 4.0, "targets": LAYERS},
    "two": {"kind": "lora", "rank": 3, "alpha": 16.0, "targets": ["v_proj", "down_proj"]},
    "core": {"kind": "core", "rank": 4, "targets": LAYERS},
    "tied": {"kind": "tied", "numbers": 300, "rank": 2, "targets": LAYERS},
    "full": {"kind": "full"},
    "moved": {"kind": "lora", "rank": 2, "targets": LAYERS},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its copy, another base; runs of views on the first, one of them on the copy; what one of them exports."""
    place = tmp_path_factory.mktemp("adapters")
    tiny_folder(place / "model")
    shutil.copytree(place / "model", place / "copy")
    tiny_folder(place / "other", seed=1)
    write_jsonl(place / "rows.jsonl", tiny_rows(24))
    for seed, (name, view) in enumerate([*VIEWS.items(), ("stranger", VIEWS["one"])]):
        base = {"two": "copy", "stranger": "other"}.get(name, "model")
        method: dict[str, Any] = {"name": "fedavg", "steps": 1, "batch_size": 4, "lr": 1e-2}
        if name == "moved":
            method |= {"name": "onebit", "merge_every": 1}
        tree = {
            "name": name,
            "rounds": 2,
            "seed": seed,
            "threads": 1,
            "model": {"path": str(place / base), "view": view},
            "data": {"path": str(place / "rows.jsonl"), "clients": 1, "max_length": 64},
            "method": method,
            "eval": {"every": 0},
        }
        (place / f"{name}.toml").write_text(tomli_w.dumps(tree))
        found = thinwire("run", place / f"{name}.toml", "--out", place / name)
        assert found.code == 0, found.err
    assert thinwire("export", place / "tied", "--thin", "--out", place / "tied.thin").code == 0
    shutil.copytree(place / "core" / "model" / "adapter", place / "peft")
    return place


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("one", "other", "shares"),
    [("one", "two", None), ("one", "two", (3, 1)), ("one", "peft", (1, 2)), ("tied.thin", "peft", None)],
)
def test_the_mean_of_the_products(place: Path, tmp_path: Path, one: str, other: str, shares: Any) -> None:
    more = ["--base", place / "model"] if "peft" in (one, other) else []
    more += ["--weights", ",".join(map(str, shares))] if shares else []
    found = thinwire("merge", place / one, place / other, "--out", tmp_path / "out", *more)
    assert (found.code, found.err) == (0, "")
    first, second = shares or (1, 1)
    runs = {"peft": "core", "tied.thin": "tied"}
    folders = [place / "model", *(place / runs.get(name, name) / "model" for name in (one, other)), tmp_path / "out"]
    start, a, b, mean = map(weights, folders)
    moved = 0.0
    for name, tensor in start.items():
        expected = tensor + (first * (a[name] - tensor) + second * (b[name] - tensor)) / (first + second)
        torch.testing.assert_close(mean[name], expected, atol=1e-6, rtol=1e-5)
        moved = max(moved, float((mean[name] - tensor).abs().max()))
    assert moved > 1e-4


def test_peft_puts_the_mean_on_the_base(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    assert thinwire("merge", place / "one", place / "two", "--out", tmp_path / "out").code == 0
    start, _, _ = load(place / "model")
    apart = PeftModel.from_pretrained(start, tmp_path / "out" / "adapter").eval()
    whole, _, _ = load(tmp_path / "out")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(apart(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5  # of the layer that both have


def test_an_adapter_of_peft_itself(place: Path, tmp_path: Path) -> None:
    """With a scale of its own for one layer, and roots of ranks; twice the same adapter is that adapter."""
    from peft import LoraConfig, get_peft_model

    start, _, _ = load(place / "model")
    settings = LoraConfig(
        r=3, lora_alpha=5, target_modules=LAYERS, alpha_pattern={"q_proj": 7}, rank_pattern={"down_proj": 2},
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    own = get_peft_model(start, settings)
    own.save_pretrained(tmp_path / "own")
    shutil.copytree(tmp_path / "own", tmp_path / "again")
    base = ["--base", place / "model"]
    assert thinwire("merge", tmp_path / "own", tmp_path / "again", "--out", tmp_path / "out", *base).code == 0
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        right, found = own.eval()(input_ids=ids).logits, load(tmp_path / "out")[0](input_ids=ids).logits
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


def test_what_is_wrong_is_one_line(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"

    def line(*args: str | Path) -> str:
        return refused("merge", *args, "--out", out)

    assert "it is of another base model, " in line(place / "one", place / "stranger")
    assert "its view, full, has no factors" in line(place / "one", place / "full")
    assert "factors of its earlier rounds are in the weights" in line(place / "one", place / "moved")
    assert "does not name its base model: give it with --base" in line(place / "one", place / "peft")
    assert "neither a run's folder nor one with" in line(place / "one", tmp_path)
    assert "No such file" in line(place / "one", tmp_path / "none")
    for text in ("1", "1,0", "1,x", "1,nan"):
        assert f"--weights: {text} is not 2 numbers above 0" in line(place / "one", place / "two", "--weights", text)
    wrong = {
        "peft_type": ("IA3", "of the kind IA3"),
        "use_dora": (True, "has use_dora = True"),
        "modules_to_save": (["lm_head"], "has modules_to_save"),
    }
    config = json.loads((place / "peft" / "adapter_config.json").read_text())
    shutil.copytree(place / "peft", tmp_path / "peft")
    base = ["--base", place / "model"]
    for name, (value, message) in wrong.items():
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        assert message in line(tmp_path / "peft", place / "one", *base)
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    assert "cannot read the adapter" in line(tmp_path / "peft", place / "one", *base)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("q_proj", "k_proj"): tensor for name, tensor in tensors.items()}, file)
    assert "has no linear layer model.layers.0.self_attn.k_proj" in line(tmp_path / "peft", place / "one", *base)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)
    assert "is no factor of a linear layer" in line(tmp_path / "peft", place / "one", *base)
    assert not out.exists()
