"""`thinwire eval PATH --tasks`: public benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinwire.commands.terminal import echo, echo_json


def score_tasks(path: Path, tasks: str, overrides: Sequence[str], limit: int | None, as_json: bool) -> None:
    """Print the scores of a run's model, or of one in a Hugging Face folder, on tasks with commas between them."""
    from thinwire import build, config
    from thinwire.evaluate.harness import harness
    from thinwire.model.net import Net

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise config.ConfigError("--tasks: names no task")
    whole = (path / "run.toml").exists()
    if whole and not (path / "model").is_dir():
        raise config.ConfigError(f"{path}: the run has not ended, so there is no model in it yet")
    tree: dict[str, Any] = {"method": {"name": "fedavg"}, "data": {"path": "none"}}
    config.override(tree, [*overrides, f"model.path={json.dumps(str(path / 'model' if whole else path))}"])
    settings = config.parse(tree, "the command line")
    build.use_threads(settings)
    if build.classes_of(settings) is not None:
        raise config.ConfigError(f"--tasks: {path} is a classifier, and the harness's tasks are for causal models")
    net = Net.open(settings.model.path, settings.model.dtype, device=settings.model.device)
    records = harness(net, names, settings.eval.batch_size, limit)
    if as_json:
        echo_json(records)
        return
    for record in records:
        scores = ", ".join(f"{key} {value:.4f}" for key, value in record["metrics"].items())
        rows = "" if record["rows"] is None else f" ({record['rows']:,} rows)"
        echo(f"{record['task']}: {scores}{rows}")
