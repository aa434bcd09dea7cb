"""The command line. Nothing heavy is imported before a command is chosen, so that --help answers at once."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from thinwire import __version__
from thinwire.commands import client, codec, estimate, keys, local_federation, report, server
from thinwire.commands import data as data_command
from thinwire.commands import init as init_command
from thinwire.commands import schema as schema_command
from thinwire.commands.chat import chat
from thinwire.commands.tasks import score_tasks
from thinwire.commands.terminal import Overrides, Stopped, cause, echo, echo_json, one_line, settle

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from thinwire.config import Run

app = typer.Typer(
    name="thinwire",
    help="Fine-tune every parameter of a language model across clients whose data cannot move, over kilobytes.",
    rich_markup_mode=None,  # plain help: rich would be half of its time
    pretty_exceptions_enable=False,
)

app.command(name="fit-codec")(codec.fit_codec)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        echo(context.get_help())


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
) -> None:
    """Run the rounds of a run file, with progress, and leave a model that transformers loads."""
    with one_line():
        settle()
        from safetensors import SafetensorError

        from thinwire import build, config, memory
        from thinwire.commands.show import Live, print_summary
        from thinwire.data.statistics import remarks, shortened
        from thinwire.runtime.course import train
        from thinwire.runtime.folder import ended, locked
        from thinwire.trackers import Trackers, check, trackers_of
        from thinwire.train import parallel

        settings = config.load(file, overrides or [])
        check(settings)
        folder = out if out is not None else Path("runs") / settings.name
        rank = parallel.join()
        check_place(folder, resume)
        with locked(folder) if not rank else contextlib.nullcontext():
            claim(folder, settings, resume)
            if ended(folder):
                echo(f"{folder}: this run is complete")
                print_summary(folder)
                return
            again = shlex.join(["thinwire", "run", str(file), *(overrides or []), "--out", str(folder), "--resume"])
            if rank:
                folder = parallel.shadow(folder)
            parallel.wait()
            build.use_threads(settings)
            with memory.for_good():
                rows = build.rows_of(settings.data, _key(settings))
                whole = build.settled(settings, rows)
            before = memory.resident()
            net = build.net_of(whole, remember=True)
            with Live(settings, rows, net, folder, resume) as watch:
                with memory.for_good():
                    job = build.job(whole, rows, net, folder, before, watch)
                for line in (shortened(job.names, job.clients, settings.data.max_length), *remarks(job.clients)):
                    watch.remark(line)
                record(folder, settings, build.fingerprints(job))
                try:
                    with Trackers(watch, trackers_of(settings, folder)) as job.watch:
                        train(job)
                except KeyboardInterrupt:
                    raise Stopped(f"stopped; go on from the last whole round with: {again}") from None
                except (OSError, SafetensorError) as error:
                    raise Stopped(f"{cause(error)}; go on from the last whole round with: {again}") from None
            print_summary(folder, estimate.verdict(settings, job, folder))


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the methods, their papers, their fields and defaults."""
    with one_line():
        from thinwire.commands.show import print_methods
        from thinwire.methods import METHODS

        table = {
            name: {
                "paper": cls.paper,
                "about": (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0],
                "fields": {
                    field: {"type": _type(info.annotation), "default": _default(info)}
                    for field, info in cls.model_fields.items()
                    if field != "name"
                },
            }
            for name, cls in sorted(METHODS.items())
        }
        if as_json:
            echo_json(table)
        else:
            print_methods(table)


@app.command(name="eval")
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run's folder, or a Hugging Face folder.")],
    overrides: Overrides = None,
    tasks: Annotated[str | None, typer.Option(help="Of lm-evaluation-harness instead: names or .yaml files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of rows, for each of --tasks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Evaluate a run on its held-out rows, or any Hugging Face folder on data.path=FILE."""
    with one_line():
        settle()
        if tasks is not None:
            score_tasks(path, tasks, overrides or [], limit, as_json)
            return
        from thinwire import build, config
        from thinwire.commands.show import print_scores

        if (path / "run.toml").exists():
            if not (path / "model").is_dir():
                raise config.ConfigError(f"{path}: the run has not ended, so there is no model in it yet")
            settings = config.load(path / "run.toml", [*(overrides or []), _model(path / "model")])
            # the saved model has its factors merged in
            plain = settings.model.model_copy(update={"lora": None, "view": config.Full()})
            settings = settings.model_copy(update={"model": plain})
            rows = build.rows_of(settings.data, _key(settings))
        elif path.is_dir():
            tree: dict[str, Any] = {"name": "eval", "method": {"name": "fedavg"}, "data": {}}
            config.override(tree, [*(overrides or []), _model(path)])
            settings = config.parse(tree, "the command line")
            whole = settings.data.model_copy(update={"partition": "iid", "clients": 1, "heldout": 0})
            rows = build.rows_of(whole, _key(settings))
            rows = build.Rows(rows.clients, {"data": next(iter(rows.clients.values()))} | rows.splits)
        else:
            raise config.ConfigError(f"{path}: not a folder")
        build.use_threads(settings)
        net = build.net_of(settings)
        scores = build.scorer(settings, net, build.splits_of(settings, rows, net.tokenizer))()
        if as_json:
            echo_json(scores)
        else:
            print_scores(scores)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A run file, with a table [compare] or without.")],
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Names, with commas between them.")] = "base,fedavg,fedkseed",
    out: Annotated[Path | None, typer.Option(help="The output's folder; runs/compare-NAME by default.")] = None,
    control: Annotated[bool, typer.Option("--control", help="Run each on shuffled answers too.")] = False,
    part: Annotated[str, typer.Option(metavar="I/N", help="Of N machines that share the work, this one's.")] = "1/1",
) -> None:
    """Run methods and references on the same model, data and cohorts, each with its rate tuned, and print the table."""
    with one_line():
        settle()
        from thinwire import compare as comparison
        from thinwire import standings
        from thinwire.commands.show import print_comparison

        tree, settings = comparison.load(file, overrides or [])
        made = comparison.plans(tree, settings, [name.strip() for name in methods.split(",") if name.strip()], control)
        mine = comparison.share(made, part)
        folder = out if out is not None else Path("runs") / f"compare-{tree.get('name', 'run')}"
        comparison.check_output(made, folder)
        comparison.check_models(made)
        folder.mkdir(parents=True, exist_ok=True)
        again = shlex.join(["thinwire", "compare", *sys.argv[2:]])
        try:
            for plan in mine if settings.costs else ():
                comparison.price(plan, folder, echo)
            comparison.settle(made, settings)
            comparison.check_output(made, folder)
            for plan in mine:
                comparison.execute(plan, made, folder, echo)
        except KeyboardInterrupt:
            raise Stopped(f"stopped; the same command goes on: {again}") from None
        except RuntimeError as error:
            raise Stopped(str(error)) from None
        comparison.recall(made, settings, folder)
        lines = [line for plan in made if (line := standings.line(plan, made, folder, settings.target)) is not None]
        standings.write(lines, made, folder)
        print_comparison(lines, made, folder)


app.command(name="data")(data_command.data)
app.command(name="init")(init_command.init)
app.command(name="schema")(schema_command.schema)
app.command(name="chat")(chat)
app.command(name="estimate")(estimate.estimate)
app.command(name="report")(report.report)
app.command(name="server")(server.server)
app.command(name="client")(client.client)
app.command(name="local-federation")(local_federation.local_federation)
app.add_typer(keys.app, name="keys")


def main() -> None:
    """The entry point."""
    atexit.register(gc.freeze)  # at its end the collector would walk through all that torch has made: two seconds
    try:
        status = app(prog_name="thinwire", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        echo(f"thinwire: {error.format_message()} (thinwire --help says more)", err=True)  # a wrong option
        status = 2
    sys.exit(status)


def check_place(folder: Path, resume: bool) -> None:
    """Refuse what is no folder, and no run to resume, before a lock makes one."""
    from thinwire import config

    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise config.ConfigError(f"--out: {there} is not a folder")
    if resume and not folder.exists():
        raise config.ConfigError(f"{folder}: there is no run to resume")


def claim(folder: Path, settings: Run, resume: bool) -> None:
    """Refuse a folder that holds anything but, under --resume, this very run."""
    from thinwire import config
    from thinwire.runtime.folder import FILE

    check_place(folder, resume)
    if not (folder / "run.toml").exists():
        if folder.exists() and {path.name for path in folder.iterdir()} - {FILE, "run.toml.part"}:
            raise config.ConfigError(f"{folder}: not empty, and not a run; choose another --out")
        if resume:
            raise config.ConfigError(f"{folder}: there is no run to resume")
        return
    if not resume:
        raise config.ConfigError(f"{folder}: already holds a run; choose another --out, or go on with --resume")
    other = config.load(folder / "run.toml")
    if (difference := settings.first_difference(other)) is not None:
        raise config.ConfigError(f"{folder}: holds another run: {difference}")


def record(folder: Path, settings: Run, fingerprints: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write run.toml; ConfigError where a run goes on that began with other rows or another start model."""
    from thinwire import config, records

    file = folder / "run.toml"
    if file.exists():
        began = config.load(file).environment
        for name, what in (("rows", "the clients' rows"), ("weights", "the start model's weights")):
            if name in began and began[name] != fingerprints.get(name, began[name]):
                raise config.ConfigError(
                    f"{folder}: {what} are not those that the run began with; put them back, or begin anew with "
                    "another --out"
                )
    environment = {**_environment(), **fingerprints}
    folder.mkdir(parents=True, exist_ok=True)
    records.replace(file, settings.model_copy(update={"environment": environment}).to_toml().encode())


def _model(path: Path) -> str:
    return f"model.path={json.dumps(str(path), ensure_ascii=False)}"  # quoted: a folder may be called 2024


def _key(settings: Run) -> Any:
    from thinwire.keys import Key

    return Key.root(settings.seed)


def _environment() -> dict[str, str]:
    import platform

    import numpy
    import torch
    import transformers

    return {
        "thinwire": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _type(annotation: Any) -> str:
    """A type as a user reads it: float | None, "adamw" | "sgd"."""
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(json.dumps(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type(inner) for inner in get_args(annotation))
    if annotation is NoneType:
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


if __name__ == "__main__":
    main()
