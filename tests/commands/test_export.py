"""What a run has trained, carried away: thinly and back to the bit, or refused in a line."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import refused, thinwire
from tiny import CHOICES, tiny_folder, tiny_rows, write_jsonl

from thinwire import wire
from thinwire.assemble import thin as thin_file
from thinwire.model.net import Net

VIEWS: dict[str, dict[str, Any]] = {
    "tied": {"kind": "tied", "numbers": 3000, "targets": ["q_proj", "v_proj"]},
    "weights": {"kind": "tied", "numbers": 3000, "over": "weights"},
    "core": {"kind": "core", "rank": 8, "targets": ["q_proj", "v_proj"]},
    "lora": {"kind": "lora", "rank": 1, "targets": ["q_proj", "v_proj"]},
    "merged": {"kind": "tied", "numbers": 3000, "targets": ["q_proj", "v_proj"]},
    "prompt": {"kind": "prompt", "tokens": 4},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have ended, beside the model and the rows."""
    place = tmp_path_factory.mktemp("export")
    tiny_folder(place / "model")
    write_jsonl(place / "rows.jsonl", tiny_rows(80, closed=True))
    for name, view in VIEWS.items():
        method: dict[str, Any] = {"name": "onebit", "steps": 2, "batch_size": 4}
        if name == "lora":
            method["name"] = "fedavg"  # whose numbers are on nobody's levels
        if name == "merged":
            method["merge_every"] = 1
        tree = {
            "name": name,
            "rounds": 2,
            "threads": 1,
            "model": {"path": str(place / "model"), "dtype": "bfloat16", "view": view},
            "data": {
                "path": str(place / "rows.jsonl"),
                "clients": 2,
                "prompt": "{input}: it was",
                "answer": " {output}",
                "choices": list(CHOICES),
                "max_length": 64,
            },
            "method": method,
            "eval": {"rows": 4},
        }
        (place / f"{name}.json").write_text(json.dumps(tree))
        import tomli_w

        (place / f"{name}.toml").write_text(tomli_w.dumps(tree))
        assert thinwire("run", place / f"{name}.toml", "--out", place / name).code == 0
    return place


@pytest.mark.parametrize("name", VIEWS)
def test_a_thin_file_and_its_base_are_the_runs_model_to_the_bit(place: Path, tmp_path: Path, name: str) -> None:
    result = thinwire("export", place / name, "--thin", "--out", tmp_path / "run.thin")
    assert result.code == 0, result.err
    length = (tmp_path / "run.thin").stat().st_size
    assert length < {"lora": 5 * 1024, "merged": 7000}.get(name, 4000)
    result = thinwire("merge", tmp_path / "run.thin", "--out", tmp_path / "merged")
    assert result.code == 0, result.err
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        theirs = place / name / "model" / file
        assert theirs.exists() == (tmp_path / "merged" / file).exists()
        assert not theirs.exists() or theirs.read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_a_folder_is_exported_too_before_the_run_has_ended(place: Path, tmp_path: Path) -> None:
    result = thinwire("export", place / "tied", "--out", tmp_path / "whole")
    assert result.code == 0, result.err
    theirs = (place / "tied" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == theirs


def test_fewer_bits_are_shorter(place: Path, tmp_path: Path) -> None:
    lengths = []
    for bits in (8, 4, 2, 1):
        file = tmp_path / f"{bits}.thin"
        assert thinwire("export", place / "tied", "--thin", "--bits", str(bits), "--out", file).code == 0
        lengths.append(file.stat().st_size)
        assert torch.isfinite(thin_file.opened(file)[0].parameter("tied.numbers")).all()
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[3] > 2500


def test_it_is_scored_and_talked_to_as_its_run_is(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert thinwire("export", place / "tied", "--thin", "--out", tmp_path / "run.thin").code == 0
    rows = f"data.path={place / 'rows.jsonl'}"
    scores = [
        json.loads(thinwire("eval", path, rows, "eval.rows=8", *more, "--json").out)
        for path, more in (
            (tmp_path / "run.thin", []),
            (place / "tied" / "model", ["data.prompt={input}: it was", "data.answer= {output}", *CHOSEN]),
        )
    ]
    # the factors beside the weights, and merged into them, are not rounded alike
    assert scores[0][0]["loss"] == pytest.approx(scores[1][0]["loss"], rel=1e-3)
    assert scores[0][0]["rows"] == scores[1][0]["rows"] == 8
    answers = []
    for path in (tmp_path / "run.thin", place / "tied"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a dreadful film\n"))
        answers.append(thinwire("chat", path).out)
    assert answers[0] == answers[1]
    assert any(choice.strip() in answers[0] for choice in CHOICES)


CHOSEN = [f"data.choices={json.dumps(list(CHOICES))}", "data.max_length=64", "model.dtype=bfloat16"]


def test_what_is_wrong_is_one_line(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.thin"
    assert thinwire("export", place / "tied", "--thin", "--out", file).code == 0
    whole = file.read_bytes()
    found = thin_file.read(file)
    tiny_folder(tmp_path / "other", hidden_size=16, num_attention_heads=2)
    assert "another base model" in refused("chat", file, "--base", tmp_path / "other")
    assert "goes with --thin" in refused("export", place / "tied", "--bits", "4", "--out", tmp_path / "x")
    assert "--bits: 3 is not" in refused("export", place / "tied", "--thin", "--bits", "3", "--out", tmp_path / "x")
    assert "no run is there" in refused("export", tmp_path, "--thin", "--out", tmp_path / "x")
    assert "No such file" in refused("merge", tmp_path / "none.thin", "--out", tmp_path / "x")
    wrong = {
        "cut": whole[:-7],
        "of zeros": bytes(500),
        "empty": b"",
        "text": b'{"a": 1}\n' * 40,
        "another view": replace(found, view='{"kind": "prompt"}'),
        "a view of another size": replace(found, view=found.view.replace("3000", "4000")),
        "a view beyond all": replace(found, view=found.view.replace("3000", "30000000000")),
        "prompts of another": replace(found, shown='{"template": 3}'),
        "prompts that are no object": replace(found, shown="[]"),
        "levels that are cut": replace(found, levels=torch.zeros(7, dtype=torch.uint8)),
        "scales that are not finite": replace(found, levels=torch.full((3006,), 255, dtype=torch.uint8)),
        "a block of none": replace(found, block=0),
        "stages of another count": replace(found, stages={"stage/0": torch.zeros(7, dtype=torch.uint8)}),
        "a stage without the one before it": replace(found, stages={"stage/1": torch.zeros(3006, dtype=torch.uint8)}),
        "numbers that are not finite": replace(found, levels=None, numbers=torch.full((3000,), torch.nan)),
        "no numbers": replace(found, levels=None),
        "another dtype": replace(found, dtype="int3"),
        "a seed of text": b"x" + whole[1:],
    }
    for name, content in wrong.items():
        file.write_bytes(content if isinstance(content, bytes) else bytes(wire.encode(content)))
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        result = thinwire("chat", file)
        assert (result.code, result.err.count("\n")) == (2, 1), (name, result)
        line = result.err
        assert len(line) < 500, name
        assert str(file) in line or "dtype" in line, (name, line)
    assert not (tmp_path / "x").exists()
    assert Net.open(str(place / "model")).size
