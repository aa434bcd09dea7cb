"""A federation on Flower ends where the run in one process ends, and carries the same frames."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from silos import Silos, audited, in_process, local_of, state_of, visits

from thinwire.assemble.thin import opened
from thinwire.config import ConfigError
from thinwire.federation.follower import check_model
from thinwire.federation.processes import alive
from thinwire.federation.superlink import refusal

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

METHODS: dict[str, tuple[dict[str, Any], int]] = {  # with the rounds
    "fedkseed": ({"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}, 2),
    # with pieces of 60,000 bytes its 108 kB frames take two messages each way
    "fedavg": ({"name": "fedavg", "lr": 1e-3, "steps": 2, "batch_size": 4}, 1),
}


BARE: dict[str, Any] = {  # a server without the model's weights
    "method": {"name": "onebit", "steps": 2, "batch_size": 4, "lr": 0.01},
    "model": {"view": {"kind": "tied", "numbers": 256, "rank": 2, "targets": ["q_proj", "v_proj"]}},
    "data": {"heldout": 0},
    "federation": {"quorum": 2, "model": False},
}


def test_a_run_on_flower_is_the_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silos = Silos.make(tmp_path, sites=2)
    table = {"chunk_bytes": 60_000, "quorum": 2}
    runs = {name: silos.run(method, rounds, federation=table) for name, (method, rounds) in METHODS.items()}
    runs["bare"] = silos.run(rounds=2, **BARE)
    local = local_of(silos, runs["fedkseed"], tmp_path / "hub")
    workers = set()
    pids: list[int] = []
    try:
        local.start()
        for name, run in runs.items():
            folder = tmp_path / "flower" / name
            silos.begin(run, folder)
            local.follow(folder, run, silos.rows(run).splits)
            workers.add(local.sites["north"].children.running["worker"].pid)
        for children in (local.server.children, *(site.children for site in local.sites.values())):
            pids += [process.pid for process in children.running.values()]
    finally:
        local.stop()
    assert len(workers) == 1  # one process has served all rounds of both runs
    assert len(pids) == 6
    assert not [pid for pid in pids if alive(pid)]
    for name, run in runs.items():
        there, here = tmp_path / "flower" / name, tmp_path / "here" / name
        frames = in_process(silos, run, here, monkeypatch)
        assert audited(local, run) == frames
        assert len(frames) == 4 * run.rounds
        assert visits(there) == visits(here)
        if name == "bare":
            assert state_of(there) == (None, state_of(here)[1])
            assert not (there / "model").exists()
            assert opened(there / "model.thin")[0].state_sha256() == state_of(here)[0]
        else:
            assert state_of(there) == state_of(here)
    mode = os.stat(local.place("north") / "north.key").st_mode & 0o777
    assert mode == 0o600


@pytest.mark.parametrize(
    ("changes", "splits", "line"),
    [
        ({"method": {"name": "fedavg"}}, [], "cannot do its part of fedavg"),
        ({"model": {"lora": {}, "bits": 8}}, [], "cannot compare quantised ones"),
        ({}, ["heldout"], "can score no rows, such as those of heldout"),
        ({"eval": {"prompts": ["amber"]}}, [], "has no use for data.public and eval.prompts"),
    ],
)
def test_a_server_without_weights_refuses_what_it_needs_them_for(
    changes: dict[str, Any], splits: list[str], line: str, tmp_path: Path
) -> None:
    run = Silos(tmp_path).run(**{**BARE, **changes})
    with pytest.raises(ConfigError, match=f"^federation.model: without weights in memory the server {line}"):
        check_model(run, splits)


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        ('{"success": true, "run-id": "17"}', None),
        ('{\n  "success": false,\n  "error-message": "no such app"\n}\n', "no such app"),
        ('Loading ...\n{"success": false}', "no reason given"),
        ("nothing that is JSON", None),
        ("{", None),
        ("[1]", None),
    ],
)
def test_a_run_that_flower_did_not_start_is_noticed(printed: str, why: str | None) -> None:
    assert refusal(printed) == why
