"""The page "On NVIDIA FLARE", every command in its order, with a tiny model; a run may change its engine on the way."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="comes with: pip install 'thinwire[nvflare]'")
pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from silos import Silos, in_process, state_of
from test_docs import SHORT, commands
from test_five_silos import ROOT, THINWIRE, typed, visits
from tiny import tiny_folder

from thinwire.federation.follower import rounds_of

pytestmark = pytest.mark.long

PAGE = "docs/flare.md"


def test_the_page_s_commands(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    tiny_folder(tmp_path / "model")
    short = ["model.path=model", *SHORT, "rounds=3", "method.steps=1"]  # a path from where the commands are typed
    lines = [shlex.split(line) for line in commands(PAGE)]
    assert len(lines) == 2
    typed(["run", lines[0][2], "data.clients=3", "--out", "runs/alone", *short], tmp_path)
    for line in lines:
        typed([*line[1:], *short], tmp_path)
    ends = {name: json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in folders(lines)}
    alone = json.loads((tmp_path / "runs" / "alone" / "summary.json").read_text())
    assert {end["sha256"] for end in ends.values()} == {alone["sha256"]}
    for name in ends:
        records = (tmp_path / "runs" / name / "rounds.jsonl").read_text().splitlines()
        assert not any("error" in visit for line in records for visit in visits(line))


def folders(lines: list[list[str]]) -> list[str]:
    return [Path(line[line.index("--out") + 1]).name for line in lines]


@pytest.mark.parametrize("engines", [("flower", "nvflare"), ("nvflare", "flower")])
def test_a_run_begun_on_one_engine_goes_on_on_the_other(
    engines: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With clients that remember, so that a site's memory is the engine's business too if anything is."""
    silos = Silos.make(tmp_path, sites=2)
    method: dict[str, Any] = {"name": "gradualdiff", "lr": 3e-3, "steps": 60, "batch_size": 4, "rounding": "residue"}
    run = silos.run(method, 8, model={"dtype": "bfloat16"})
    (tmp_path / "run.toml").write_text(run.to_toml())
    line = [*THINWIRE, "local-federation", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    first = subprocess.Popen([*line, "--engine", engines[0]], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 900
    try:
        while rounds_of(tmp_path / "out") < 2:
            assert first.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(120)
    assert 2 <= rounds_of(tmp_path / "out") < 8
    subprocess.run([*line, "--engine", engines[1], "--resume"], stdout=subprocess.DEVNULL, check=True, timeout=900)
    in_process(silos, run, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "out") == state_of(tmp_path / "here")
