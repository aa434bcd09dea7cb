"""A run on a prompt view from its file to its folder: scored, talked to, carried away, gone on with."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from test_cli import Result, refused, thinwire
from tiny import CHOICES, tiny_folder, tiny_rows, write_jsonl

from thinwire.assemble.thin import BASE, Shelf
from thinwire.model.net import Net
from thinwire.model.views import saved_in

OPEN = {"prompt": "{input}: it was", "answer": " {output}"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, beside the model and the rows."""
    place = tmp_path_factory.mktemp("prompt")
    tiny_folder(place / "model", initializer_range=0.2)  # so that what is in front matters
    write_jsonl(place / "rows.jsonl", tiny_rows(60, closed=True))
    tree = {
        "name": "prompt",
        "rounds": 2,
        "threads": 1,
        "model": {"path": str(place / "model"), "view": {"kind": "prompt", "tokens": 4}},
        "data": {"path": str(place / "rows.jsonl"), "clients": 2, "choices": list(CHOICES), "max_length": 64, **OPEN},
        "method": {"name": "fedavg", "lr": 0.1, "steps": 3, "batch_size": 4},
        "eval": {"rows": 8},
    }
    (place / "run.toml").write_text(tomli_w.dumps(tree))
    result = thinwire("run", place / "run.toml", "--out", place / "run")
    assert result.code == 0, result.err
    return place


def spoken(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        return thinwire("chat", path, "--max-new-tokens=4")


def logits(net: Net) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = net.model(input_ids=torch.arange(65, 85)[None]).logits
    return found


def test_its_folder_is_scored_with_the_prompt_and_says_so(place: Path) -> None:
    first, last = (json.loads(line) for line in (place / "run" / "evals.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"] - 0.01
    result = thinwire("eval", place / "run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == [{key: value for key, value in last.items() if key != "round"}]
    rows = [f"data.path={place / 'rows.jsonl'}", *(f'data.{name}="{text}"' for name, text in OPEN.items())]
    asked = [*rows, f"data.choices={json.dumps(CHOICES)}", "--json"]
    with_it, without = (json.loads(thinwire("eval", place / at, *asked).out)[0] for at in ("run/model", "model"))
    assert with_it["loss"] < without["loss"] - 0.01
    assert "the prompt in front of every row stands in `adapter/`" in (place / "run/model/README.md").read_text()


def test_it_is_talked_to_with_the_prompt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = spoken(place / "run", "amber splendid\n", monkeypatch)
    assert with_it.code == 0, with_it.err
    assert thinwire("export", place / "run", "--thin", "--out", place / "run.thin").code == 0
    thin = spoken(place / "run.thin", "amber splendid\n/use base\namber splendid\n", monkeypatch)
    assert thin.code == 0, thin.err
    assert thin.out.splitlines()[0] == with_it.out.strip()
    # folders of no run answer in their own words
    with_it, without = (spoken(place / at, "amber splendid\n", monkeypatch) for at in ("run/model", "model"))
    assert with_it.code == without.code == 0, with_it.err
    assert with_it.out != without.out


def test_a_thin_file_gives_the_prompt_or_the_bare_base(place: Path, tmp_path: Path) -> None:
    assert thinwire("export", place / "run", "--thin", "--out", tmp_path / "run.thin").code == 0
    shelf = Shelf([tmp_path / "run.thin"])
    folder = place / "run/model"
    view = saved_in(folder)
    assert view is not None
    trained = Net.open(str(folder), view=view)
    torch.testing.assert_close(logits(shelf.use("run")[0]), logits(trained), rtol=0, atol=1e-5)
    assert torch.equal(logits(shelf.use(BASE)[0]), logits(Net.open(str(place / "model"))))
    torch.testing.assert_close(logits(shelf.use("run")[0]), logits(trained), rtol=0, atol=1e-5)


def test_another_run_goes_on_from_it_or_refuses_in_a_line(place: Path, tmp_path: Path) -> None:
    on: list[Any] = [place / "run.toml", f"model.path={place / 'run/model'}", "rounds=1"]
    line = refused("run", *on, 'model.view={kind="lora"}', "--out", tmp_path / "lora")
    assert line.startswith("model.view: the weights of ")
    assert "go with the prompt in its folder adapter" in line
    assert not (tmp_path / "lora").exists()
    assert thinwire("run", *on, "model.view.init=adapter", "--out", tmp_path / "more").code == 0
    evals = [json.loads(line) for line in (tmp_path / "more" / "evals.jsonl").read_text().splitlines()]
    last = json.loads((place / "run" / "evals.jsonl").read_text().splitlines()[-1])
    assert evals[0]["loss"] == last["loss"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            ["data.pack=true", 'data.loss="answer"'],
            "data.pack: a prompt stands in front of a row, and not of each of its",
        ),
        (["model.view.tokens=1023"], "model.view.tokens: 1023 leave no room for a row in the 1024 positions of "),
        (["model.bits=8"], "model: bits needs [model.lora]"),
        (
            ["method.name=fedpeptao"],
            "method: fedpeptao shares the parameters of some layers, and this view trains those",
        ),
        (["method.name=slora"], "model.lora: missing; slora works with the factors of a LoRA view"),
        (["method.name=feddm"], "model.view: feddm trains on embeddings, a prompt stands in front of tokens alone"),
        (["model.view.text=a"], 'model.view.text: goes together with model.view.init = "text"'),
        (["model.view.init=adapter"], "cannot read "),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(place: Path, tmp_path: Path, changes: list[str], line: str) -> None:
    words = [place / "run.toml", *changes, "--out", tmp_path / "out"]
    assert refused("run", *words).removeprefix(f"{words[0]}: ").startswith(line)
    assert not (tmp_path / "out").exists()
