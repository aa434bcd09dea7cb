"""Every method on every objective: it trains, or one line before anything runs says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rows import MODELS, ROWS, model_of
from tiny import CHOICES, tiny_encoder, tiny_folder, tiny_rows, write_jsonl

from thinwire import assemble, config
from thinwire.config.schema import without_none
from thinwire.errors import ConfigError
from thinwire.estimate.costs import estimate
from thinwire.methods import METHODS
from thinwire.model.errors import ModelError
from thinwire.runtime import course
from thinwire.runtime.course import Watch

ROW = {method: next(row for row, of in ROWS.items() if of.method.name == method) for method in METHODS}
ENCODERS = ("classes", "pairs")
LAYERS = {"q_proj": "query", "v_proj": "value"}  # what a BERT calls them
DATA: dict[str, dict[str, Any]] = {
    "answers": {"prompt": "{input}: it was", "answer": " {output}"},
    "packed": {"prompt": "{input}: it was", "answer": " {output}", "pack": True},
    "text": {"template": "text"},
    "choices": {"prompt": "{input}: it was", "answer": " {output}", "choices": list(CHOICES)},
    "preferences": {"template": "chat", "loss": "dpo"},
    "classes": {},
    "pairs": {"loss": "contrastive"},
}
HEAD = "a classifier's view trains its head too: classifier.weight"
OPEN = "data.choices: missing; feddm is for a closed set of answers that are scored, and these are open"
FRONT = 'the run file: model.view: does not go with data.loss = "contrastive": a prompt in front of a text is of '
REFUSED = {
    **{(name, "classes"): f"model.lora: {name} codes factors alone, and {HEAD}" for name in ("cgfed", "tgap")},
    **{
        (name, "classes"): f"model.lora: {name} works with factors alone, and {HEAD}"
        for name in ("fedex", "flexlora", "flora", "hetlora", "slora")
    },
    **{("feddm", objective): OPEN for objective in ("answers", "packed", "text", "preferences", "pairs")},
    ("fedcybgd", "preferences"): 'data.loss: "dpo" compares with the start model, which a client of fedcybgd does not ',
    ("fedcybgd", "pairs"): 'data.loss: "contrastive" is of whole encoders, and a client of fedcybgd has a smaller one',
    ("fedpeptao", "packed"): "data.pack: a prompt stands in front of a row, and not of each of its examples; leave it ",
    ("fedpeptao", "pairs"): FRONT,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, an encoder, and rows for each objective."""
    folder = tmp_path_factory.mktemp("objectives")
    tiny_folder(folder / "decoder")
    tiny_encoder(folder / "encoder")
    for name in ("answers", "packed", "choices", "classes"):
        write_jsonl(folder / f"{name}.jsonl", tiny_rows(40, closed=True))
    numbers = range(40)
    others: dict[str, list[dict[str, str]]] = {
        "text": [{"text": f"The {i}th of forty lines"} for i in numbers],
        "preferences": [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": "never"} for i in numbers],
        "pairs": [{"anchor": f"what of {i}", "positive": f"it is {i}"} for i in numbers],
    }
    for name, rows in others.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_of(method: str, objective: str, place: Path, on: str | None = None) -> config.Run:
    """`on`: of MODELS, if not the one that the method's row runs on."""
    row, encoder = ROW[method], objective in ENCODERS
    model = json.loads(json.dumps(MODELS[on or model_of(row)]))
    if encoder and "targets" in model.get("view", {}):
        model["view"]["targets"] = [LAYERS[name] for name in model["view"]["targets"]]
    tree = {
        "rounds": 2,
        "model": {"path": str(place / ("encoder" if encoder else "decoder")), **model},
        "data": {"path": str(place / f"{objective}.jsonl"), "clients": 3, "heldout": 6, **DATA[objective]},
        "method": without_none(ROWS[row].method.model_dump(mode="json")),
        "eval": {"rows": 6, "generate": 0},
    }
    return config.parse(tree)


@pytest.mark.parametrize("objective", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_an_objective_or_is_refused(
    method: str, objective: str, place: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    line = ""
    try:
        job = assemble.begin(*assemble.prepared(run_of(method, objective, place))).job(folder, Watch())
    except (ConfigError, ModelError) as error:
        line = str(error)
    if (method, objective) in REFUSED:
        assert line.startswith(REFUSED[method, objective])
        assert "\n" not in line
        return
    assert line == ""
    summary = course.train(job)
    errors = [c["error"] for r in course.read_records(folder / "rounds.jsonl") for c in r["clients"] if "error" in c]
    assert errors == []
    first, last = summary["first"][0]["loss"], summary["final"][0]["loss"]
    assert math.isfinite(last)
    assert last != first


@pytest.mark.parametrize("on", ["whole", "lora", "lora of B", "core", "prompt", "tied factors"])
@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_of_any_method_under_any_view_is_made_or_refused_in_a_line(
    method: str, on: str, place: Path
) -> None:
    for objective in ("choices", "classes"):
        line, found = "model.", None
        try:
            found = estimate(run_of(method, objective, place, on))
        except (ConfigError, ModelError) as error:
            line = str(error)
        assert "\n" not in line
        assert line.startswith(("model.", "method.", "data.", "the run file: "))
        assert found is None or found.traffic is None or found.traffic.total[1].most > 0
