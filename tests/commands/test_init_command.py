"""thinwire init: what it writes can be run as it stands."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused, thinwire
from tiny import tiny_encoder, tiny_folder, tiny_rows, write_jsonl
from typer.testing import CliRunner

from thinwire import config
from thinwire.cli import app


def tickets(folder: Path, rows: int = 48) -> Path:
    lines = ["ticket,branch,message,team"]
    for i in range(rows):
        team = ("it", "pay roll")[i % 3 > 0]
        lines.append(f'T{i},{("north", "süd")[i % 2]},"the ""{team}"" ticket {i}, please",{team}')
    path = folder / "tickets.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def written(*args: str | Path) -> tuple[dict[str, Any], str]:
    """What init wrote, as TOML, and what it printed."""
    result = thinwire("init", *args)
    assert (result.code, result.err) == (0, ""), result
    return tomllib.loads(Path(args[0]).read_text(encoding="utf-8")), result.out


def test_from_a_csv_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tickets(tmp_path)
    tiny_folder(tmp_path / "model")
    tree, out = written("tickets.toml", "--data", "tickets.csv")
    data = tree["data"]
    assert (data["path"], data["partition"], data["column"]) == ("tickets.csv", "column", "branch")
    assert (data["prompt"], data["answer"]) == ("message: {message}\nteam:", " {team}")
    assert (data["choices"], data["max_length"]) == (["pay roll", "it"], 32)
    assert out.startswith("wrote tickets.toml\n  48 rows, with the columns ticket, branch, message, team\n")
    assert out.endswith("look at it, then: thinwire data tickets.toml\n")

    tiny = ("model.path=model", "data.max_length=96")  # its tokens are bytes
    assert thinwire("data", "tickets.toml", *tiny).code == 0
    result = thinwire("run", "tickets.toml", *tiny, "rounds=1", "method.steps=2")
    assert result.code == 0, result
    scores = json.loads(thinwire("eval", "runs/tickets", "--json").out)
    assert [(score["split"], score["rows"]) for score in scores] == [("heldout", 4)]


@pytest.mark.parametrize("kind", ["open", "folder", "few", "odd"])
def test_what_is_written_is_a_run(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "rows.jsonl"
    if kind == "folder":
        place = tmp_path / "silos"
        place.mkdir()
        for name in ("a", "b"):
            write_jsonl(place / f"{name}.jsonl", tiny_rows(5))
    elif kind == "odd":
        quoted = 'who said "a\\b"?'
        place.write_text("".join(json.dumps({quoted: f"x {i}\n", "answer": f"{i}"}) + "\n" for i in range(9)))
    else:
        write_jsonl(place, tiny_rows(3 if kind == "few" else 30))
    tree, _ = written(tmp_path / "run.toml", "--data", place)
    run = config.load(tmp_path / "run.toml")
    assert run.data.path == str(place)
    expected = {"open": ("iid", 4), "folder": ("files", 8), "few": ("iid", 1), "odd": ("iid", 4)}
    assert (run.data.partition, run.data.clients) == expected[kind]
    if kind == "odd":
        assert tree["data"]["prompt"] == 'who said "a\\b"?: {who said "a\\b"?}\nanswer:'
    else:
        assert tree["data"]["template"] == "chat"


def test_without_data_it_is_a_run_file_to_fill_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = thinwire("init")
    assert (result.code, result.err) == (0, "")
    assert "data.path is a placeholder" in result.out
    assert config.load(Path("run.toml")).data.path == "rows.jsonl"
    assert refused("data", "run.toml") == "rows.jsonl: cannot be read (No such file or directory)"


def test_every_field_that_it_shows_in_a_comment_is_one(tmp_path: Path) -> None:
    written(tmp_path / "run.toml")
    lines = (tmp_path / "run.toml").read_text().splitlines()
    # "# pack = true", and "# prompt = ..." with answer, in place of template
    wanted = ("# pack", "# prompt", "# answer")
    text = "\n".join(line.removeprefix("# ") if line.startswith(wanted) else line for line in lines)
    (tmp_path / "all.toml").write_text(text)
    run = config.load(tmp_path / "all.toml")
    assert run.data.pack
    assert run.data.prompt == "question: {question}\nanswer:"
    assert config.load(tmp_path / "all.toml", ["method.name=fedkseed"]).method.name == "fedkseed"  # type: ignore[attr-defined]


def test_what_it_refuses(tmp_path: Path) -> None:
    path = tickets(tmp_path)
    mine = tmp_path / "mine.toml"
    mine.write_text("x = 1\n")
    (tmp_path / "one.csv").write_text("text\nx\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    for args, line in (
        ((mine, "--data", path), f"{mine}: exists already; choose another name"),
        ((tmp_path / "run.yaml",), f"{tmp_path / 'run.yaml'}: a run file ends in .toml"),
        ((tmp_path / "no" / "run.toml",), f"{tmp_path / 'no' / 'run.toml'}: {tmp_path / 'no'} is not a folder"),
        ((tmp_path / "a.toml", "--data", tmp_path / "none.csv"), f"{tmp_path / 'none.csv'}: cannot be read ("),
        ((tmp_path / "a.toml", "--data", tmp_path / "one.csv"), f"{tmp_path / 'one.csv'}: no prompt and answer can be"),
        (
            (tmp_path / "a.toml", "--data", tmp_path / "ragged.csv"),
            f"{tmp_path / 'ragged.csv'}:3: 1 cells where the fi",
        ),
    ):
        assert refused("init", *args).startswith(line)
    assert mine.read_text() == "x = 1\n"
    assert not (tmp_path / "a.toml").exists()


@pytest.mark.parametrize(
    ("link", "memory", "method", "view"),
    [
        ("kilobytes", "inference", "fedkseed", "full"),
        ("kilobytes", "lora", "onebit", "tied"),
        ("megabytes", "lora", "fedavg", "lora"),
        ("megabytes", "training", "gradualdiff", "full"),
        ("gigabytes", "training", "fedavg", "full"),
    ],
)
def test_link_and_memory_choose_the_method(link: str, memory: str, method: str, view: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    assert f"\n  {method}" in thinwire("init", file, "--link", link, "--memory", memory).out
    run = config.load(file)
    assert (config.method_name(run.method), run.model.view.kind) == (method, view)


def test_asked_for_it_asks_three_questions(tmp_path: Path) -> None:
    asked = CliRunner().invoke(app, ["init", str(tmp_path / "run.toml"), "--ask"], input="kilobytes\ninference\nopen\n")
    assert asked.exit_code == 0, asked.output
    assert asked.output.count("?") == 3
    assert "open answers: without gradients hardly anything" in asked.output
    assert config.method_name(config.load(tmp_path / "run.toml").method) == "fedkseed"


def test_preferences_are_trained_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file of theirs to scores and back, by the commands that init names."""
    monkeypatch.chdir(tmp_path)
    fields = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": "never"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in fields))
    tiny_folder(tmp_path / "model")
    tree, out = written("pairs.toml", "--data", "pairs.jsonl")
    assert (tree["data"]["template"], tree["data"]["loss"], tree["data"]["beta"]) == ("chat", "dpo", 0.1)
    assert "loss: dpo" in out
    tiny = ("model.path=model", "data.max_length=96", "data.heldout=4", "data.clients=2")
    shown = thinwire("data", "pairs.toml", *tiny).out
    assert "it was preferred to < what was rejected" in shown
    assert "  < never" in shown
    assert thinwire("run", "pairs.toml", *tiny, "rounds=1", "method.steps=3").code == 0
    (before, after) = [json.loads(line) for line in Path("runs/pairs/evals.jsonl").read_text().splitlines()]
    assert (before["accuracy"], before["loss"]) == (0, pytest.approx(0.6931, abs=1e-4))
    assert after["loss"] < before["loss"]
    (again,) = json.loads(thinwire("eval", "runs/pairs", "--json").out)
    assert again["loss"] == pytest.approx(after["loss"], abs=1e-4)
    assert again["accuracy"] == after["accuracy"]
    alone = refused("eval", "runs/pairs/model", "data.path=pairs.jsonl", "data.template=chat", "data.loss=dpo")
    assert "compares with the start model, which runs/pairs/model does not name; evaluate the run" in alone


def test_pairs_are_trained_as_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file of theirs to scores and back, by the commands that init names."""
    monkeypatch.chdir(tmp_path)
    fields = [{"anchor": f"Where is {i}?", "positive": f"in room {i}", "negative": "nowhere"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in fields))
    tiny_encoder(tmp_path / "encoder")
    tree, out = written("pairs.toml", "--data", "pairs.jsonl")
    assert (tree["model"]["path"], tree["model"]["lora"]["targets"]) == ("minilm", ["query", "key", "value"])
    assert (tree["data"]["loss"], tree["data"]["scale"]) == ("contrastive", 20.0)
    assert "template" not in tree["data"]
    assert "loss: contrastive" in out
    tiny = ("model.path=encoder", "data.max_length=64", "data.heldout=4", "data.clients=2")
    shown = thinwire("data", "pairs.toml", *tiny).out
    assert "| anchor  > what belongs to it  < what does not" in shown
    assert "nowhere" in shown
    assert "answer: median of its positive" in shown
    assert thinwire("estimate", "pairs.toml", *tiny).code == 0
    more = ("rounds=1", "method.steps=3", "eval.show_rows=true")
    assert thinwire("run", "pairs.toml", *tiny, *more).code == 0
    (before, after) = [json.loads(line) for line in Path("runs/pairs/evals.jsonl").read_text().splitlines()]
    assert after["loss"] < before["loss"]
    assert before["samples"][0]["prompt"].startswith("Where is ")
    assert before["samples"][0]["answer"].startswith("in room ")
    (again,) = json.loads(thinwire("eval", "runs/pairs", "--json").out)
    assert again["loss"] == pytest.approx(after["loss"], abs=1e-4)
    assert (again["accuracy"], again["recall_10"], again["mrr"]) == pytest.approx(
        (after["accuracy"], after["recall_10"], after["mrr"])
    )
    paired = ("data.path=pairs.jsonl", "data.loss=contrastive", "data.max_length=64")
    (alone,) = json.loads(thinwire("eval", "runs/pairs/model", *paired, "--json").out)
    assert alone["rows"] == 16
    card = Path("runs/pairs/model/README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert "| recall@10 |" in card
    assert "answer nothing" in refused("chat", "runs/pairs")
    assert "a model of embeddings cannot be written" in refused("export", "runs/pairs", "--out", "g", "--gguf", "q8_0")
    assert thinwire("export", "runs/pairs", "--out", "whole").code == 0
    assert (tmp_path / "whole" / "modules.json").exists()
