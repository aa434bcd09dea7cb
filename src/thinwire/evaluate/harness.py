"""MMLU, C-Eval, GSM8K and the rest, through EleutherAI's lm-evaluation-harness (the extra `lm-eval`).

A task is the name of one of the harness's, whose data a hub must then reach, or a task file of the user's own in its
YAML format: such a one runs offline if its data lie beside it. What the file runs (`!function`) is the user's code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from thinwire.data.errors import DataError
from thinwire.model.errors import first_line

if TYPE_CHECKING:
    from thinwire.model.net import Net


def harness(net: Net, tasks: Sequence[str], batch_size: int = 8, limit: int | None = None) -> list[dict[str, Any]]:
    """A record for each task and group: task, rows, and the harness's metrics with their standard errors.

    `tasks` are names or .yaml files; `limit` is of rows a task. The global generators are as before afterwards.
    DataError: the harness is not installed, a task is unknown, or it cannot be read or run.
    """
    if find_spec("lm_eval") is None:
        raise DataError('--tasks: needs lm-evaluation-harness: pip install "thinwire[lm-eval]"')
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    named = [task for task in tasks if task not in own]
    manager = TaskManager(include_defaults=bool(named))
    for name in named:
        if not manager.match_tasks([name]):
            raise DataError(f"--tasks: the harness has no task {name!r}, and there is no such .yaml file")
    wanted = [*(_read(Path(file)) for file in own), *manager.match_tasks(named)]
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the harness seeds it
    try:
        model = HFLM(
            pretrained=net.model,
            tokenizer=net.tokenizer,
            batch_size=batch_size,
            device=str(net.device),
            max_length=net.positions,  # None: as the model's config has it
            backend="causal",
        )
        # it would ask git and the system about itself, and show what git prints where there is no repository
        silent = partial(patch.multiple, "lm_eval.evaluator", create=True)
        with silent(get_git_commit_hash=lambda: None, add_env_info=lambda found: None):
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=wanted,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                verbosity="ERROR",
            )
    except Exception as error:  # whatever a task's data, templates and filters raise
        raise DataError(f"--tasks: {type(error).__name__}: {first_line(error)}") from error
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
    return [_record(name, scores, found) for name, scores in (found["results"] | found.get("groups", {})).items()]


def _read(file: Path) -> dict[str, Any]:
    """A task file, its own data files sought beside it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise DataError(f"--tasks: there is no file {file}")
    try:
        task: dict[str, Any] = load_yaml(file, resolve_func=True)
        files = task.get("dataset_kwargs", {}).get("data_files", {})
        if isinstance(files, str):
            files = {"test": files}
        for split, name in files.items():
            if isinstance(name, str) and (file.parent / name).is_file():
                files[split] = str((file.parent / name).resolve())
    except Exception as error:
        raise DataError(f"{file}: not a task file: {first_line(error)}") from error
    if files:
        task["dataset_kwargs"]["data_files"] = files
    return task


def _record(name: str, scores: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    rows = found.get("n-samples", {}).get(name, {}).get("effective")
    metrics = {
        key.removesuffix(",none").replace(",none", ""): value
        for key, value in scores.items()
        if key != "sample_len"
        and isinstance(value, float | int)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
    return {"task": name, "rows": rows, "metrics": metrics}
