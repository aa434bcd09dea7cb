"""thinwire eval: scores of a run's model, or of any other, on held-out rows or public benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.commands.terminal import Overrides, echo, echo_json, one_line, settle

if TYPE_CHECKING:
    from thinwire.assemble import Rows
    from thinwire.config import Run


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run's folder, a Hugging Face folder, a thin file.")],
    overrides: Overrides = None,
    base: Annotated[str | None, typer.Option(help="The model that thin files are of, where it is elsewhere.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Of lm-evaluation-harness instead: names or .yaml files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of rows, for each of --tasks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Evaluate a run on its held-out rows; a model, or thin files of one base, on data.path=FILE."""
    with one_line():
        settle()
        if tasks is not None:
            _tasks(path, tasks, overrides or [], limit, as_json)
            return
        from thinwire import assemble, config
        from thinwire.commands.show import print_scores
        from thinwire.keys import Key
        from thinwire.model.resolve import PACKAGED, resolve

        if path.is_file():
            _thin(path, base, overrides or [], as_json)
            return
        if (path / "run.toml").exists():
            if not (path / "model").is_dir():
                raise config.ConfigError(f"{path}: the run has not ended, so there is no model in it yet")
            begun = config.load(path / "run.toml", overrides or [])
            settings = config.load(path / "run.toml", [*(overrides or []), _named(path / "model")])
            # the saved model has its factors merged in
            plain = settings.model.model_copy(update={"lora": None, "view": config.Full()})
            settings = _with_prompt(settings.model_copy(update={"model": plain}), path / "model")
            rows = assemble.rows_of(settings.data, Key.root(settings.seed))
        elif path.is_dir() or str(path).lower() in PACKAGED:
            tree: dict[str, Any] = {"name": "eval", "method": {"name": "fedavg"}, "data": {}}
            config.override(tree, [*(overrides or []), _named(path)])
            settings = _with_prompt(config.parse(tree, "the command line"), resolve(str(path)))
            rows = _all_of(settings)
            if (begun := settings).data.loss == "dpo":
                raise config.ConfigError(
                    f'data.loss: "dpo" compares with the start model, which {path} does not name; evaluate the run'
                )
        else:
            raise config.ConfigError(f"{path}: neither a folder nor a file, nor one of {', '.join(PACKAGED)}")
        assemble.use_threads(settings)
        splits = None
        if settings.data.loss == "dpo":  # what the start model has of them is measured before its weights make room
            splits = assemble.splits_of(begun, rows, assemble.net_of(begun))
        net = assemble.net_of(settings)
        splits = assemble.splits_of(settings, rows, net) if splits is None else splits
        scores = assemble.scorer(settings, net, splits)()
        if as_json:
            echo_json(scores)
        else:
            print_scores(scores)


def _with_prompt(settings: Run, folder: Path) -> Run:
    """The settings with the prompt that belongs to the weights in a folder, if one does."""
    from thinwire.model.views import saved_in

    if (view := saved_in(folder)) is None:
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"lora": None, "view": view})})


def _all_of(settings: Run) -> Rows:
    """All rows of the source as one split."""
    from thinwire import assemble
    from thinwire.keys import Key

    whole = settings.data.model_copy(update={"partition": "iid", "clients": 1, "heldout": 0})
    rows = assemble.rows_of(whole, Key.root(settings.seed))
    return assemble.Rows(rows.clients, {"data": next(iter(rows.clients.values()))} | rows.splits)


def _thin(path: Path, base: str | None, words: Sequence[str], as_json: bool) -> None:
    """Print the scores of thin files on data.path=FILE, shown as their runs showed rows; a word without = is a file."""
    from thinwire import assemble, config
    from thinwire.assemble import thin
    from thinwire.commands.show import print_scores

    overrides = [word for word in words if "=" in word]
    shelf = thin.Shelf([path, *(Path(word) for word in words if "=" not in word)], base)
    found: dict[str, Any] = {}
    for name in shelf.names:
        net, file = shelf.use(name)
        tree: dict[str, Any] = {"name": "eval", "method": {"name": "fedavg"}, "data": json.loads(file.shown)}
        config.override(tree, overrides)
        settings = config.parse(tree, "the command line")
        assemble.use_threads(settings)
        preferences = settings.data.loss == "dpo"
        splits = assemble.splits_of(settings, _all_of(settings), shelf.use(thin.BASE)[0] if preferences else net)
        if preferences:
            net, _ = shelf.use(name)
        found[name] = assemble.scorer(settings, net, splits)()
        if not as_json:
            shown = f"{name}: " if len(shelf.names) > 1 else ""
            print_scores([{**record, "split": f"{shown}{record['split']}"} for record in found[name]])
    if as_json:
        echo_json(found if len(found) > 1 else found[shelf.names[0]])


def _tasks(path: Path, tasks: str, overrides: Sequence[str], limit: int | None, as_json: bool) -> None:
    """Print the scores of a run's model, or of one in a Hugging Face folder, on tasks with commas between them."""
    from thinwire import assemble, config
    from thinwire.evaluate.harness import harness
    from thinwire.model.net import Net
    from thinwire.model.resolve import resolve
    from thinwire.model.views import saved_in

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise config.ConfigError("--tasks: names no task")
    whole = (path / "run.toml").exists()
    if whole and not (path / "model").is_dir():
        raise config.ConfigError(f"{path}: the run has not ended, so there is no model in it yet")
    tree: dict[str, Any] = {"method": {"name": "fedavg"}, "data": {"path": "none"}}
    config.override(tree, [*overrides, _named(path / "model" if whole else path)])
    settings = config.parse(tree, "the command line")
    assemble.use_threads(settings)
    folder = resolve(settings.model.path)
    if assemble.classes_of(settings, folder) is not None:
        raise config.ConfigError(f"--tasks: {path} is a classifier, and the harness's tasks are for causal models")
    net = Net.open(folder, settings.model.dtype, device=settings.model.device, view=saved_in(folder) or config.Full())
    records = harness(net, names, settings.eval.batch_size, limit)
    if as_json:
        echo_json(records)
        return
    for record in records:
        scores = ", ".join(f"{key} {value:.4f}" for key, value in record["metrics"].items())
        rows = "" if record["rows"] is None else f" ({record['rows']:,} rows)"
        echo(f"{record['task']}: {scores}{rows}")


def _named(path: Path) -> str:
    return f"model.path={json.dumps(str(path), ensure_ascii=False)}"  # quoted: a folder may be called 2024
