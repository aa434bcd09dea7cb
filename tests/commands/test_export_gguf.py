"""`thinwire export --gguf`: a run's model as llama.cpp and Ollama read it, or a line on why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from test_cli import refused, thinwire
from tiny import CHOICES, VOCABULARY, merging_tokenizer, tiny_encoder, tiny_folder, tiny_rows, write_jsonl

from thinwire.model.net import Net


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs that have ended: of a LoRA view, of a prompt, of a classifier."""
    place = tmp_path_factory.mktemp("gguf")
    tiny_folder(place / "model", vocab_size=VOCABULARY + 1)
    merging_tokenizer().save_pretrained(place / "model")
    tiny_encoder(place / "encoder")
    write_jsonl(place / "rows.jsonl", tiny_rows(24, closed=True))
    shown = {"prompt": "{input}: it was", "answer": " {output}", "choices": list(CHOICES)}
    views = {"lora": {"kind": "lora"}, "front": {"kind": "prompt", "tokens": 2}, "sorts": {"kind": "full"}}
    for name, view in views.items():
        model = "encoder" if name == "sorts" else "model"
        tree: dict[str, Any] = {
            "name": name,
            "rounds": 1,
            "threads": 1,
            "model": {"path": str(place / model)} | {"view": view},
            "data": {
                "path": str(place / "rows.jsonl"),
                "clients": 2,
                "max_length": 64,
                "choices": list(CHOICES),
                **shown,
            },
            "method": {"name": "fedavg", "steps": 1, "batch_size": 4, "lr": 1e-2},
        }
        (place / f"{name}.toml").write_text(tomli_w.dumps(tree))
        found = thinwire("run", place / f"{name}.toml", "--out", place / name)
        assert found.code == 0, found.err
    return place


def test_a_file_and_its_modelfile(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINWIRE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    for _ in range(2):  # its own work is replaced
        found = thinwire("export", place / "lora", "--gguf", "f32", "--out", out)
        assert (found.code, found.err) == (0, "")
    assert "the next token is the model's 256 of 256 times" in found.out
    assert {file.name for file in out.iterdir()} == {"lora-f32.gguf", "Modelfile"}
    text = (out / "Modelfile").read_text()
    assert text.startswith("FROM ./lora-f32.gguf\n")
    assert "# not translated: the closed set of answers" in text
    assert 'TEMPLATE """{{ .Prompt }}: it was"""' in text
    ids = torch.arange(60, 160)[None]
    paths = (place / "lora" / "model", out / "lora-f32.gguf")
    with torch.no_grad():
        ours, theirs = (Net.open(str(path)).model(input_ids=ids).logits for path in paths)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    short = thinwire("export", place / "lora", "--gguf", "q8_0", "--out", tmp_path / "short")
    assert short.code == 0, short.err
    assert (tmp_path / "short" / "lora-q8_0.gguf").stat().st_size < 0.6 * (out / "lora-f32.gguf").stat().st_size


def test_what_is_wrong_is_one_line(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert "--gguf: q4 is not q8_0, f16 or f32" in refused("export", place / "lora", "--gguf", "q4", "--out", out)
    assert "does not go with" in refused("export", place / "lora", "--gguf", "f16", "--thin", "--out", out)
    assert "virtual tokens" in refused("export", place / "front", "--gguf", "f16", "--out", out)
    assert "a classifier cannot" in refused("export", place / "sorts", "--gguf", "f16", "--out", out)
    assert "will not replace" in refused("export", place / "lora", "--gguf", "f16", "--out", place)
    assert not out.exists()
    config = json.loads((place / "model" / "config.json").read_text())
    try:
        (place / "model" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
        assert "no place for hidden_act" in refused("export", place / "lora", "--gguf", "f16", "--out", out)
    finally:
        (place / "model" / "config.json").write_text(json.dumps(config))
    assert not out.exists()


def test_classes_that_the_rows_named_are_those_of_what_is_exported(tmp_path: Path) -> None:
    """The run file lists none: the model that the run left has them."""
    tiny_encoder(tmp_path / "encoder")
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(24, closed=True))
    view = {"kind": "lora", "rank": 2, "targets": ["query"]}
    tree = {
        "rounds": 1,
        "model": {"path": str(tmp_path / "encoder"), "view": view},
        "data": {"path": str(tmp_path / "rows.jsonl"), "clients": 2, "heldout": 4},
        "method": {"name": "fedavg", "steps": 1},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tree))
    assert thinwire("run", tmp_path / "run.toml", "--out", tmp_path / "run").code == 0
    assert thinwire("export", tmp_path / "run", "--out", tmp_path / "exported").code == 0
    left, exported = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("run/model", "exported"))
    assert exported["id2label"] == left["id2label"] == dict(zip("01", sorted(CHOICES), strict=True))
    line = refused("export", tmp_path / "run", "--gguf", "q8_0", "--out", tmp_path / "gguf")
    assert "a classifier cannot be written" in line
