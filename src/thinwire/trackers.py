"""Experiment trackers: what a run records, sent to TensorBoard, MLflow or Weights & Biases too, all on this machine.

One seam: a tracker takes numbers by name at a round. All receive the same, the lines of rounds.jsonl and evals.jsonl
flattened; nothing else of a run, and no row of anybody's data, reaches them. Each is imported where a run names it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from thinwire.config import ConfigError, Run, method_name
from thinwire.records import SCORES, Record
from thinwire.runtime.course import Watch


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """These numbers belong to that round."""
        ...

    def close(self) -> None:
        """Nothing follows; what was logged is on disk."""
        ...


class Trackers(Watch):
    """Passes on what a run reports to another watch, and its numbers to trackers."""

    def __init__(self, inner: Watch, trackers: Sequence[Tracker]) -> None:
        self.inner, self.trackers = inner, trackers

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self.trackers:
            tracker.close()

    def round_begins(self, round: int, rounds: int, cohort: Sequence[int]) -> None:
        """See Watch."""
        self.inner.round_begins(round, rounds, cohort)

    def client_done(self, client: int) -> None:
        """See Watch."""
        self.inner.client_done(client)

    def round_ends(self, record: Record, left: float) -> None:
        """See Watch."""
        self.inner.round_ends(record, left)
        self._log(record["round"], of_round(record))

    def evaluated(self, record: Record) -> None:
        """See Watch."""
        self.inner.evaluated(record)
        self._log(record["round"], of_eval(record))

    def noticed(self, line: str) -> None:
        """See Watch."""
        self.inner.noticed(line)

    def _log(self, round: int, values: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(round, values)


def of_round(record: Record) -> dict[str, float]:
    """The numbers of a line of rounds.jsonl, by name: bytes, seconds, memory, clients, and the method's metrics."""
    lost = sum("error" in visit for visit in record["clients"])
    values = {
        "bytes/down": record["bytes_down"],
        "bytes/up": record["bytes_up"],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "clients/answered": len(record["clients"]) - lost,
        "clients/dropped": lost,
        **{f"train/{name}": value for name, value in record["metrics"].items()},
    }
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def of_eval(record: Record) -> dict[str, float]:
    """The numbers of a line of evals.jsonl, by name: heldout/loss and so on."""
    return {f"{record['split']}/{score}": float(record[score]) for score in SCORES if record.get(score) is not None}


def check(run: Run) -> None:
    """ConfigError where the run file names a tracker that is not installed."""
    for name in run.track.to:
        if find_spec(name) is None:
            raise ConfigError(f"track.to: {name} is not installed: pip install 'thinwire[{name}]'")


def trackers_of(run: Run, folder: Path) -> list[Tracker]:
    """The trackers that the run file names, writing below the run's folder."""
    made: dict[str, Callable[[Run, Path], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
    return [made[name](run, folder) for name in run.track.to]


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, run: Run, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class MLflow:
    """A run in the store that MLFLOW_TRACKING_URI names, by default files in the folder `mlflow`."""

    def __init__(self, run: Run, folder: Path) -> None:
        # its newer releases want it stated that plain files are meant
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
        self._client: Any = MlflowClient(tracking_uri=where)
        found = self._client.get_experiment_by_name(run.track.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.track.project)
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        for name, value in parameters(run).items():
            self._client.log_param(self._id, name, value)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=round)

    def close(self) -> None:
        """See Tracker."""
        self._client.set_terminated(self._id)


class WandB:
    """An offline run in the folder `wandb`, which `wandb sync` sends on if and when somebody wants that."""

    def __init__(self, run: Run, folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True)
        self._run: Any = wandb.init(
            mode="offline", dir=str(folder), project=run.track.project, name=run.name, config=parameters(run),
            settings=settings,
        )  # fmt: skip

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log({**values, "round": round})

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


def parameters(run: Run) -> dict[str, Any]:
    """What a tracker receives of the run file: the method and its fields, the model, the seed."""
    fields = {f"method.{name}": value for name, value in run.method.model_dump(mode="json").items() if name != "name"}
    return {"method": method_name(run.method), "model": run.model.path, "seed": run.seed, "rounds": run.rounds} | fields
