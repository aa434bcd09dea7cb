"""A federation from Python: a model, the clients' rows, a method, a number of rounds."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinwire import assemble, config
from thinwire.config import ConfigError
from thinwire.core import Method
from thinwire.data import partition
from thinwire.data.errors import DataError
from thinwire.data.rows import Row, kind, present
from thinwire.keys import Key
from thinwire.methods.fedkseed import FedKSeed
from thinwire.model.folder import whole_folder
from thinwire.model.load import DTYPES
from thinwire.model.tokens_and_generation import quiet
from thinwire.records import Record, read_records
from thinwire.runtime.cohort import All, Segment
from thinwire.runtime.course import Watch, train

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Table = Any  # rows: a list of dicts, a datasets.Dataset, a pandas.DataFrame
KEPT = ("run.toml", "rounds.jsonl", "evals.jsonl", "summary.json")


@dataclass(frozen=True)
class Result:
    """What a federation leaves: the trained model and the records of how it came about.

    `summary` is that of a run folder: totals, first and final scores. `folder` holds the run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    summary: Record
    folder: Path

    @property
    def rounds(self) -> Any:
        """A row for each round and client: bytes both ways, seconds, examples, loss; see `evals` for the type."""
        records = read_records(self.folder / "rounds.jsonl")
        return _table([{"round": r["round"], **client} for r in records for client in r["clients"]])

    @property
    def evals(self) -> Any:
        """A row for each evaluation and split, without samples or lines of clients: a DataFrame, or a list of dicts."""
        records = read_records(self.folder / "evals.jsonl")
        return _table([{key: value for key, value in r.items() if key not in ("samples", "each")} for r in records])

    def save(self, folder: str | Path) -> Path:
        """Write a run folder with the records and `model/`, which from_pretrained loads; the folder's path.

        ConfigError: something is there already.
        """
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{folder}: is there already; choose another folder")
        with whole_folder(target, replace=True) as fresh:
            shutil.copytree(self.folder / "model", fresh / "model")
            for name in KEPT:
                shutil.copy(self.folder / name, fresh / name)
        return target


def federate(
    model: str | Path | PreTrainedModel,
    clients: Mapping[str, Table] | Sequence[Table],
    method: Method | str | None = None,
    rounds: int = 10,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    heldout: Table | float = 0.1,
    cohort: Segment | Sequence[Segment] = All(),  # noqa: B008 - frozen
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    eval: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    lora: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    watch: Watch | None = None,
) -> Result:
    """Train a model with the clients' rows, which are only ever seen by their client's half of the method.

    `model`: what model.path takes, or a live transformers model with its `tokenizer`; yours is left as it is, and the
    trained one is `.model` of the result. `clients`: the rows of each, in a dict by name or a list; rows are dicts, a
    datasets.Dataset or a pandas.DataFrame. `method`: such as FedKSeed(steps=50), or a name. `heldout`: rows to score
    on, or a share of each client's. `data` and `eval` are fields of the run file's tables of these names, such as
    {"prompt": "{text}", "answer": "{label}"} and {"every": 1}; `weights` of federation.weights: who counts how much,
    {"by": "equal"} or {"cap": 0.4}. `folder` keeps the run; by default it is a temporary one, gone with the result.
    ConfigError, DataError, ModelError (all ValueErrors): what is wrong, in one line.
    """
    place = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="thinwire-"))
    if folder is not None and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"folder: {folder} is there already; choose another")
    try:
        result = _run(
            str(model) if isinstance(model, str | Path) else _saved(model, tokenizer, place / "start"),
            _rows(clients, heldout, Key.root(seed)),
            method if method is not None else FedKSeed(),
            {
                "rounds": rounds,
                "seed": seed,
                "cohort": [s.model_dump(exclude_none=True) for s in _listed(cohort)],
                "data": {"path": "python", **(data or {})},
                "eval": dict(eval or {}),
                "model": {
                    "dtype": dtype or _dtype(model),
                    "device": device,
                    **({"lora": dict(lora)} if lora is not None else {}),
                },
                **({"federation": {"weights": dict(weights), "audit": False}} if weights is not None else {}),
            },
            place,
            watch or Watch(),
        )
    except BaseException:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
        raise
    if folder is None:
        weakref.finalize(result, shutil.rmtree, place, ignore_errors=True)
    return result


def _run(
    path: str, rows: assemble.Rows, method: Method | str, tree: dict[str, Any], place: Path, watch: Watch
) -> Result:
    name = {"name": method} if isinstance(method, str) else {"name": "fedavg"}
    run = config.parse(tree | {"method": name, "model": {"path": path, **tree["model"]}}, "federate()")
    if isinstance(method, Method):
        run = run.model_copy(update={"method": method})
    start = assemble.begin(*assemble.prepared(run, rows))
    place.mkdir(parents=True, exist_ok=True)
    (place / "run.toml").write_text(start.run.to_toml(), encoding="utf-8")
    summary = train(start.job(place, watch))
    start.net.model.config.use_cache = True
    return Result(start.net.model, start.net.tokenizer, summary, place)


def _rows(clients: Mapping[str, Table] | Sequence[Table], heldout: Table | float, key: Key) -> assemble.Rows:
    """The rows as a run has them; DataError for what is none."""
    if isinstance(clients, Mapping):
        named = dict(clients)
    elif isinstance(clients, Sequence) and not isinstance(clients, str):
        if any(isinstance(client, Mapping) for client in clients):
            raise DataError("clients: is a list of rows; it must be a list of clients, each with rows of its own")
        named = {f"client-{i}": client for i, client in enumerate(clients)}
    else:
        raise DataError(f"clients: is a {type(clients).__name__}; give a list or dict of clients, each with its rows")
    if not named:
        raise DataError("clients: there are none")
    held = {str(name): _read(table, f"client {name}") for name, table in named.items()}
    for name, rows in held.items():
        if not rows:
            raise DataError(f"clients: {name!r} has no rows")
    if not isinstance(heldout, int | float):
        return assemble.Rows(held, {"heldout": _read(heldout, "heldout")})
    if not heldout:
        return assemble.Rows(held, {})
    parts = {name: partition.holdout(rows, heldout, key.fold("heldout", name)) for name, rows in held.items()}
    splits = [row for _, out in parts.values() for row in out]
    if not splits:
        raise DataError(f"heldout: {heldout} of each client's rows holds out none at all")
    return assemble.Rows({name: kept for name, (kept, _) in parts.items()}, {"heldout": splits})


def _read(table: Table, source: str) -> list[Row]:
    if find_spec("pandas") is not None:
        import pandas

        if isinstance(table, pandas.DataFrame):
            table = _records(table, source)
    if isinstance(table, str | Mapping) or not isinstance(table, Iterable):
        raise DataError(f"{source}: {kind(table)} where rows are expected: a list of dicts, a Dataset, a DataFrame")
    rows = []
    for i, fields in enumerate(table, 1):
        if not isinstance(fields, Mapping):
            raise DataError(f"{source}:{i}: the row is {kind(fields)}, not a dict")
        rows.append(Row(present(fields), source, i))
    return rows


def _records(frame: pandas.DataFrame, source: str) -> list[dict[Any, Any]]:
    """The rows of a frame. Whole numbers that pandas made floats, as a cell among them is missing, are whole again."""
    if not frame.columns.is_unique:
        raise DataError(f"{source}: two columns are called {frame.columns[frame.columns.duplicated()][0]!r}")
    floats = frame.select_dtypes("float")
    exact = floats[(floats % 1 == 0) & (floats.abs() < 2**53)].notna() | floats.isna()
    whole = [name for name in floats if floats[name].hasnans and exact[name].all()]
    rows: list[dict[Any, Any]] = frame.astype(dict.fromkeys(whole, "Int64")).to_dict("records")
    return rows


def _saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, place: Path) -> str:
    """The folder of a live model, from which a run starts."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model: is a {type(model).__name__}; give a transformers model, a folder or a name")
    if tokenizer is None:
        raise ConfigError("tokenizer: missing; a live model comes with its own")
    with quiet():
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return str(place)


def _dtype(model: Any) -> str:
    dtype = getattr(model, "dtype", None)
    return next((name for name, known in DTYPES.items() if known == dtype), "float32")


def _listed(cohort: Segment | Sequence[Segment]) -> list[Segment]:
    return list(cohort) if isinstance(cohort, Sequence) else [cohort]


def _table(records: list[Record]) -> Any:
    if find_spec("pandas") is None:
        return records
    import pandas

    return pandas.DataFrame(records)
