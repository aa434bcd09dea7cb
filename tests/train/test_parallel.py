"""A client of two processes ends where one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CHOICES, tiny_folder, tiny_model, tiny_rows, tiny_tokenizer, write_jsonl

from thinwire.data.batch import Batch, Dataset
from thinwire.data.templates import Template
from thinwire.data.tokenise import tokenise
from thinwire.keys import Key
from thinwire.train import parallel
from thinwire.train.objective import loss

PROMPT = Template("{input}: it was", " {output}")
# Each in its own launch would take its imports anew, so one launch runs all of these.
RUNS = {
    "fedavg": ["method.name=fedavg", "method.lr=1e-2", "method.steps=3", "method.batch_size=5"],
    "open": ["method.name=fedavg", "method.lr=1e-2", "method.steps=3", "method.batch_size=3", "data.loss=answer"],
    "fedkseed": ["method.name=fedkseed", "method.lr=1e-3", "method.queries=3", "method.steps=3", "method.seeds=32"],
    "fedzo": ["method.name=fedzo", "method.lr=1e-3", "method.queries=2", "method.steps=2"],
}
STEPS = ["model.shards=true", "method.steps=3", "method.batch_size=5"]
SGD = ["method.optimiser=sgd"]
LORA = ["model.view.kind=lora", "model.view.rank=2", 'model.view.targets=["q_proj", "v_proj"]']
RUNS |= {  # weights, gradients and moments in shards
    "shards": ["method.name=fedavg", "method.lr=1e-2", *STEPS],
    "shards-kept": ["method.name=fedavg", "method.lr=1e-2", "method.moments=kept", "method.recompute=true", *STEPS],
    "shards-one-row": ["method.name=fedavg", "method.lr=1e-3", *STEPS, "method.batch_size=1", "data.loss=answer"],
    "shards-proximal": ["method.name=fedavg", "method.lr=1e-2", "method.proximal=0.1", "method.clip=0.1", *STEPS],
    "shards-scaffold": ["method.name=scaffold", "method.lr=1e-2", *SGD, *STEPS],
    "shards-slora": ["method.name=slora", "method.lr=1e-3", *LORA, *STEPS],
    "shards-hetlora": ["method.name=hetlora", "method.lr=0.1", "method.penalty=0.1", *SGD, *LORA, *STEPS],
    "shards-fedelmy": ["method.name=fedelmy", "method.lr=1e-2", *SGD, *STEPS, "method.steps=2"],
    "shards-bfloat16": ["method.name=gradualdiff", "method.lr=0.1", *SGD, "model.dtype=bfloat16", *STEPS],
    "shards-lora": ["method.name=fedavg", "method.lr=1e-2", *LORA, *STEPS],
}
EXACT = {"fedkseed", "fedzo"}
# A run that is stopped in its last round and goes on, by two processes both times.
STOPPED = "fedkseed"
LAUNCHED = """
import json
import os
import sys
from pathlib import Path
from unittest import mock
from thinwire.commands import show
from thinwire.cli import app
from thinwire.train.shards import Spread

made = Spread.__init__

def counted(self, model, parameters):
    made(self, model, parameters)
    place = Path(args[-1])
    visit = {"run": place.name, "rank": int(os.environ["RANK"]), "whole": sum(w.numel() for w in self.weights)}
    visit["held"] = sum(w.to_local().numel() for w in self.weights)
    visit["own"] = sum(p.numel() for p in parameters if p.untyped_storage().nbytes() >= p.nbytes)
    with open(place.parents[1] / "held.jsonl", "a") as out:
        out.write(json.dumps(visit) + "\\n")

Spread.__init__ = counted

def stop(self, record, left):
    if record["round"] == 2:
        raise KeyboardInterrupt

for args in [line.split("\\t") for line in sys.argv[1].splitlines()]:
    if args[0] == "stop":
        with mock.patch.object(show.Live, "round_ends", stop):
            assert app(["run", *args[1:]], standalone_mode=False) == 1
    else:
        app(args, standalone_mode=False)
"""


def data(choices: tuple[str, ...] | None) -> Dataset:
    return tokenise(tiny_rows(9, closed=True), PROMPT, tiny_tokenizer(), max_length=64, choices=choices)


@pytest.mark.parametrize("choices", [None, CHOICES])
@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_the_parts_of_a_batch_make_up_its_loss(
    choices: tuple[str, ...] | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts_make_up_its_loss(next(data(choices).batches(Key.root(0), 9)), size, monkeypatch)


@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_the_parts_of_a_packed_batch_make_up_its_loss(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = next(replace(data(None), pack=128).batches(Key.root(0), 9))
    assert 1 < len(batch.input_ids) < batch.examples == 9
    parts_make_up_its_loss(batch, size, monkeypatch)


@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_the_parts_of_a_batch_of_preferences_make_up_its_loss(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held = data(None)
    pairs = [replace(e, rejected=e.answer[::-1], reference=0.4 * i) for i, e in enumerate(held.examples)]
    parts_make_up_its_loss(replace(held, examples=tuple(pairs), beta=2.0).collated(pairs), size, monkeypatch)


def parts_make_up_its_loss(batch: Batch, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    total, examples = 0.0, 0
    for rank in range(size):
        monkeypatch.setattr(parallel, "ranks", lambda rank=rank: (rank, size))
        mine, share = parallel.part(batch)
        if mine is not None:
            total, examples = total + share * loss(model, mine).item(), examples + mine.examples
    assert examples == 9
    assert total == pytest.approx(loss(model, batch).item(), abs=1e-5)
    nothing = replace(batch, kind="open", labels=torch.full_like(batch.labels, -100), choice=None)
    assert parallel.part(nothing)[1] in (0.0, 1.0)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each run by one process, in `one`, and by two, in `two`."""
    place = tmp_path_factory.mktemp("parallel")
    tiny_folder(place / "model")
    write_jsonl(place / "rows.jsonl", tiny_rows(24, closed=True))
    (place / "run.toml").write_text(
        f'rounds = 2\n[model]\npath = "{place}/model"\n[data]\npath = "{place}/rows.jsonl"\nclients = 2\nheldout = 4\n'
        'prompt = "{input}: it was"\nanswer = " {output}"\nchoices = ["great", "terrible"]\n'
        '[method]\nname = "fedavg"\n[eval]\nrows = 4\n'
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for side, size in (("one", 1), ("two", 2)):
        lines = [["run", f"{place}/run.toml", *more, "--out", f"{place}/{side}/{name}"] for name, more in RUNS.items()]
        if size == 2:
            again = [f"{place}/run.toml", *RUNS[STOPPED], "--out", f"{place}/two/stopped"]
            lines += [["stop", *again], ["run", *again, "--resume"]]
        for rank in range(size):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            env = dict(os.environ) | world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, "-c", LAUNCHED, "\n".join("\t".join(line) for line in lines)]
            started.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
    for process in started:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        if process is not started[0]:
            assert f"stopped; go on from the last whole round with: thinwire run {place}/run.toml" in err
            assert f"--out {place}/two/stopped --resume" in err
        assert (process is started[2]) == (out == "")  # the second process prints nothing
    return place


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_end_where_one_does(name: str, ends: Path) -> None:
    one, two = (json.loads((ends / side / name / "summary.json").read_text()) for side in ("one", "two"))
    assert one["final"][0]["loss"] != one["first"][0]["loss"]
    if name in EXACT:  # each direction is asked about by one process alone, as it would be anyway
        assert one["sha256"] == two["sha256"]
        assert (one["bytes_up"], one["bytes_down"]) == (two["bytes_up"], two["bytes_down"])
    mine, theirs = (load_file(ends / side / name / "model" / "model.safetensors") for side in ("one", "two"))
    assert set(mine) == set(theirs)
    for tensor, weights in mine.items():  # sums of gradients are rounded otherwise
        rounding = 2**-6 if weights.dtype == torch.bfloat16 else 1e-3  # two units in the last place
        torch.testing.assert_close(theirs[tensor], weights, atol=2e-4, rtol=rounding)


@pytest.mark.parametrize("name", [name for name in RUNS if "shards" in name])
def test_each_of_two_processes_holds_half_while_it_trains(name: str, ends: Path) -> None:
    visits = [json.loads(line) for line in (ends / "held.jsonl").read_text().splitlines()]
    mine = [visit for visit in visits if visit["run"] == name]
    assert {visit["rank"] for visit in mine} == {0, 1}
    assert [visit["rank"] for visit in mine].count(0) == len(mine) / 2 >= 2  # of two rounds
    for visit in mine:
        assert visit["own"] == 0  # the parameters themselves have no memory meanwhile
        assert visit["held"] <= 0.55 * visit["whole"]  # a layer's last rows are filled up


def test_two_processes_go_on_where_they_were_stopped(ends: Path) -> None:
    whole, stopped = (json.loads((ends / "two" / name / "summary.json").read_text()) for name in (STOPPED, "stopped"))
    assert whole["sha256"] == stopped["sha256"]
    rounds = [
        json.loads(line)["round"] for line in (ends / "two" / "stopped" / "rounds.jsonl").read_text().splitlines()
    ]
    assert rounds == [1, 2]


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel.join() == 0
    assert parallel.ranks() == (0, 1)
    assert parallel.device_of("cuda") == "cuda"
    monkeypatch.setattr(parallel, "ranks", lambda: (1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (parallel.device_of("cuda"), parallel.device_of("cpu")) == ("cuda:1", "cpu")


def test_another_process_writes_beside_the_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "rounds.jsonl").write_text("{}\n")
    place = parallel.shadow(tmp_path / "run")
    assert (place / "rounds.jsonl").read_text() == "{}\n"
    assert place != tmp_path / "run"
    assert not list(parallel.shadow(tmp_path / "none").iterdir())
