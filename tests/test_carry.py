"""What is carried away: a model that generates in transformers, its card, and a talk in the terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import yaml
from test_cli import Result, refused, thinwire
from tiny import CHOICES, tiny_encoder, tiny_folder, tiny_rows, write_jsonl

RUN = """
name = "carried"
rounds = 1
[model]
path = "{place}/model"
[data]
path = "{place}/secretname.jsonl"
clients = 2
heldout = 6
prompt = "{{input}}: it was"
answer = " {{output}}"
[method]
name = "fedavg"
steps = 1
batch_size = 4
[eval]
generate = 2
max_new_tokens = 4
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a LoRA view, and one of an encoder."""
    folder = tmp_path_factory.mktemp("carry")
    tiny_folder(folder / "model")
    tiny_encoder(folder / "encoder")
    write_jsonl(folder / "secretname.jsonl", tiny_rows(24, closed=True))
    (folder / "run.toml").write_text(RUN.format(place=folder))
    lora = ["model.lora.rank=2", "--out", folder / "run"]
    assert thinwire("run", folder / "run.toml", *lora).code == 0
    path = f"model.path={folder}/encoder"
    found = thinwire("run", folder / "run.toml", path, "eval.generate=0", "--out", folder / "classes")
    assert found.code == 0, found
    return folder


def spoken(*args: str | Path, text: str) -> Result:
    """`thinwire chat` that is given `text` through a pipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        return thinwire("chat", *args)


def test_the_text_generation_pipeline_takes_the_model(place: Path) -> None:
    from transformers import pipeline

    speaks = pipeline("text-generation", model=str(place / "run" / "model"))
    (found,) = speaks("amber birch: it was", max_new_tokens=5, do_sample=False)
    assert found["generated_text"].startswith("amber birch: it was")
    sorts = pipeline("text-classification", model=str(place / "classes" / "model"))
    assert sorts("amber birch: it was")[0]["label"] in CHOICES


def test_the_adapter_stands_alone_beside_the_merged_model(place: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(place / "model")
    apart = PeftModel.from_pretrained(start, place / "run" / "model" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(place / "run" / "model").eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(apart(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("run", "tag"), [("run", "text-generation"), ("classes", "text-classification")])
def test_the_card_has_method_bytes_and_scores_and_no_row(run: str, tag: str, place: Path) -> None:
    text = (place / run / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == tag
    summary = json.loads((place / run / "summary.json").read_text())
    for part in (f"{summary['bytes_up']:,}", f"{summary['bytes_down']:,}", "fedavg", "arXiv:1602.05629", "18 rows"):
        assert part in body
    assert f"{summary['final'][0]['loss']:.4g}" in body
    assert ("adapter/" in body) == (run == "run")
    assert ("exact match" in body) == (run == "run")
    for row in tiny_rows(24, closed=True):
        assert row.fields["input"] not in text
    assert "secretname" not in text
    assert str(place) not in text


def test_a_talk_through_a_pipe(place: Path) -> None:
    found = spoken(place / "run", "--max-new-tokens", "4", text="amber birch\n\ncedar\n")
    assert (found.code, found.err) == (0, "")
    assert found.out.count("\n") >= 2
    again = spoken(place / "run", "--max-new-tokens", "4", text="amber birch\n")
    assert found.out.startswith(again.out.rstrip("\n"))
    classes = spoken(place / "classes", text="amber birch\ncedar\n")
    assert [line.split()[0] in CHOICES for line in classes.out.splitlines()] == [True, True]
    plain = spoken(place / "model", "--max-new-tokens", "2", text="hello\nand again\n")  # with its chat template
    assert (plain.code, plain.err) == (0, "")
    assert spoken(place / "run", text="").out == ""


def test_a_closed_set_is_chosen_from_as_an_evaluation_does(place: Path, tmp_path: Path) -> None:
    from thinwire import assemble, config
    from thinwire.data.rows import Row
    from thinwire.model.net import Net
    from thinwire.train.objective import scores

    run = config.load(place / "run" / "run.toml")
    data = run.data.model_copy(update={"choices": CHOICES})
    (tmp_path / "run.toml").write_text(run.model_copy(update={"data": data}).to_toml())
    (tmp_path / "model").symlink_to(place / "run" / "model")
    net, lines = Net.open(str(place / "run" / "model")), ("amber birch", "cedar", "dune")
    expected = []
    for line in lines:
        row = Row({"input": line, "output": CHOICES[1]}, "input", 1)
        batch, _ = next(assemble.dataset(data, [row], net.tokenizer).in_order(1))
        expected.append(CHOICES[int(scores(net.model, batch)[0].argmax())])
    found = spoken(tmp_path, text="\n".join(lines))
    assert (found.code, found.err) == (0, "")
    assert [line.split()[0] for line in found.out.splitlines()] == expected


def test_bad_input_is_one_line(place: Path, tmp_path: Path) -> None:
    assert refused("chat", tmp_path / "none").endswith("neither a folder, a .gguf file nor a name on the hub")
    (tmp_path / "run.toml").write_text(RUN.format(place=place))
    assert "the run has not ended" in refused("chat", tmp_path)
    assert "no head" in refused("chat", place / "encoder")
    assert "classifier" in refused("eval", place / "classes", "--tasks", "mmlu")
    assert "names no task" in refused("eval", place / "run", "--tasks", ",")
    assert "the run has not ended" in refused("eval", tmp_path, "--tasks", "mmlu")
