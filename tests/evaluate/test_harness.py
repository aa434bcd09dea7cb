"""lm-evaluation-harness on local task files, offline."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import refused, thinwire
from tiny import tiny_folder

from thinwire.data.batch import collate
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.data.templates import Template
from thinwire.data.tokenise import tokenise
from thinwire.evaluate.harness import harness
from thinwire.model.net import Net
from thinwire.train.objective import scores

lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval")
TASK = """
task: local_mmlu
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [
    {"question": f"What is {a} + {b}?", "choices": [str(a + b + k) for k in range(4)], "answer": (a * b) % 4}
    for a in range(4)
    for b in range(3)
]


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return Net.open(str(tiny_folder(tmp_path / "m")))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file in the form of MMLU's, with its questions beside it."""
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "local_mmlu.yaml").write_text(TASK)
    return tmp_path / "local_mmlu.yaml"


@lm_eval
def test_a_local_task_scores_as_our_own_closed_set(net: Net, task: Path) -> None:
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    (found,) = harness(net, [str(task)], batch_size=4)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (str(np.random.get_state()), random.getstate()) == before[1:]  # noqa: NPY002
    rows = []
    for i, q in enumerate(QUESTIONS):
        lines = [q["question"], *(f"{letter}. {c}" for letter, c in zip("ABCD", q["choices"], strict=True)), "Answer:"]
        rows.append(Row({"p": "\n".join(lines), "a": "ABCD"[q["answer"]]}, "x", i))
    letters = tuple("ABCD")
    data = tokenise(rows, Template("{p}", " {a}"), net.tokenizer, max_length=512, choices=letters)
    with torch.no_grad():
        best = [int(scores(net.model, collate([e], data.pad, data.candidates)).argmax()) for e in data.examples]
    right = sum(b == e.choice for b, e in zip(best, data.examples, strict=True)) / len(rows)
    assert (found["task"], found["rows"]) == ("local_mmlu", len(rows))
    assert found["metrics"]["acc"] == pytest.approx(right)
    assert harness(net, [str(task)], limit=5)[0]["rows"] == 5


@lm_eval
def test_a_task_file_from_the_command_line(net: Net, task: Path) -> None:
    found = thinwire("eval", net.folder, "--tasks", task, "--limit", "3", "--json")
    (record,) = json.loads(found.out)
    assert (record["task"], record["rows"]) == ("local_mmlu", 3)
    lines = thinwire("eval", net.folder, "--tasks", task).out.splitlines()
    assert lines[-1].startswith("local_mmlu: acc 0.")
    assert lines[-1].endswith("(12 rows)")
    assert "there is no file" in refused("eval", net.folder, "--tasks", "none.yaml")


@lm_eval
def test_a_task_that_cannot_be_read_is_one_line(net: Net, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none.yaml"):
        harness(net, [str(tmp_path / "none.yaml")])
    (tmp_path / "odd.yaml").write_text("task: [")
    with pytest.raises(DataError, match=r"odd.yaml: not a task file"):
        harness(net, [str(tmp_path / "odd.yaml")])
    (tmp_path / "odd.yaml").write_text(TASK.replace("local_mmlu", "odd"))
    with pytest.raises(DataError, match=r"--tasks: "):
        harness(net, [str(tmp_path / "odd.yaml")])  # its data are not there


@lm_eval
@pytest.mark.long  # the harness first reads all its task files
def test_an_unknown_name_is_one_line(net: Net) -> None:
    with pytest.raises(DataError, match="the harness has no task 'nothing-like-it'"):
        harness(net, ["nothing-like-it"])


def test_without_the_harness_it_shows_how_to_install_it(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinwire.evaluate.harness.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install \"thinwire\[lm-eval\]\""):
        harness(net, ["mmlu"])
