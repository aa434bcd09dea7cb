"""Each site's own fine-tuning on each site's rows, at the sites."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from silos import Silos, in_process

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from grid import federate

from thinwire.assemble.replay import Replay
from thinwire.errors import ConfigError
from thinwire.federation.local import OPEN
from thinwire.federation.transport import NoQuorum
from thinwire.federation.worker import Worker
from thinwire.records import read_records
from thinwire.runtime import course

LORA = {"view": {"kind": "lora", "rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}}
TIED = {"view": {"kind": "tied", "numbers": 300, "targets": ["q_proj", "v_proj"]}}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedit": ({"name": "fedavg", "lr": 1e-2, "steps": 4, "batch_size": 4}, LORA),
    "onebit": ({"name": "onebit", "lr": 1e-2, "steps": 4, "batch_size": 4}, TIED),
    "fedkseed": ({"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 4, "batch_size": 4}, LORA),
}
CROSS = {"evaluate": True, "cross": True}


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("cross"))


def matrix(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cross.json").read_text())
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_sites_find_what_one_process_finds(
    name: str, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, model = METHODS[name]
    run = silos.run(method, 2, model=model, federation=CROSS)
    job, grid, _ = federate(silos, run, tmp_path / "sites")
    for client in range(3):
        allowed = tmp_path / f"policy{client}.toml"
        allowed.write_text(f"{OPEN}cross = true\n")
        grid.workers[client] = Worker(replace(grid.workers[client].site, policy=str(allowed)))
    job.card = None
    course.train(job)
    in_process(silos, run, tmp_path / "here", monkeypatch)
    there, here = matrix(tmp_path / "sites"), matrix(tmp_path / "here")
    assert there == here
    assert there["round"] == 2
    assert all(isinstance(loss, float) for each in there["clients"].values() for loss in each["losses"])
    last = [row for row in read_records(tmp_path / "here" / "evals.jsonl") if row["split"] == "sites_train"][-1]
    assert there["together"] == [each["loss"] for each in last["each"]]

    (tmp_path / "work").mkdir()
    replay = Replay(tmp_path / "here", tmp_path / "work", cross=True)
    for client in range(3):
        alone = replay.losses(frozenset([client]), own=True)
        assert there["clients"][str(client)]["losses"] == pytest.approx(alone, abs=1e-6)


def test_a_run_goes_on_as_if_nobody_had_looked(silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, model = METHODS["onebit"]
    for name, federation in (("looked", CROSS), ("not", {"evaluate": True})):
        run = silos.run(method, 2, model=model, federation=federation)
        in_process(silos, run, tmp_path / name, monkeypatch)
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("looked", "not"))
    assert one["sha256"] == other["sha256"]


def test_a_site_that_does_not_allow_it_takes_no_part(silos: Silos, tmp_path: Path) -> None:
    method, model = METHODS["fedit"]
    job, _, _ = federate(silos, silos.run(method, 1, model=model, federation=CROSS), tmp_path / "run")
    job.card = None
    with pytest.raises(NoQuorum, match=r"does not allow federation\.cross"):
        course.train(job)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("fedit", {"federation": {"cross": True}}, "cross goes together with evaluate"),
        ("fedit", {"federation": CROSS, "model": {}}, "adapters and cores are compared"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    method: str, fields: dict[str, Any], message: str, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        in_process(silos, silos.run(METHODS[method][0], 1, **fields), tmp_path / "run", monkeypatch)
